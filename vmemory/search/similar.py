"""Search the entries of a memory by cosine about their mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.ops.similarity_topk import similarity_topk


class Found(NamedTuple):
    """Values `[Q, k]` float32 cosines, best first; entry `[Q, k]` int64; −inf and −1 if there are fewer than k."""

    values: Tensor
    entry: Tensor


def centred_search(queries: Tensor, entries: Tensor, k: int, *, centre_queries: bool = True) -> Found:
    """Find the k entries most similar to each query, by cosine after subtracting the mean of the entries.

    The common part of all frames of a video would dominate the cosine; subtracting the mean removes it.

    Args:
        queries: `[Q, D]`.
        entries: `[n, D]`; n = 0 finds nothing.
        k: Entries per query.
        centre_queries: Also subtract the mean from the queries; for queries of another kind, such as sentences, False.
    """
    # in float64, because rounding would order equal entries arbitrarily
    entries, queries = entries.double(), queries.double()
    if len(entries):
        mean = entries.mean(0)
        entries = entries - mean
        if centre_queries:
            queries = queries - mean
    entries, queries = entries.float(), queries.float()
    found = similarity_topk(queries[None], entries[None], k)
    return Found(found.values[0], found.indices[0])


def spread(found: Found, time: Tensor, k: int, apart: float) -> Found:
    """Return the best k of one query's results that are at least `apart` seconds from every better one.

    Args:
        found: Results of one query, `[1, n]`, best first.
        time: `[n]` seconds of the entries.
    """
    kept: list[int] = []
    taken: list[float] = []
    for place, entry in enumerate(found.entry[0].tolist()):
        if entry < 0 or len(kept) == k:
            break
        at = float(time[entry])
        if all(abs(at - other) >= apart for other in taken):
            kept.append(place)
            taken.append(at)
    chosen = torch.tensor(kept, dtype=torch.int64, device=found.entry.device)
    return Found(found.values[:, chosen], found.entry[:, chosen])
