"""Search among the entries of a memory, about the mean of what it holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.ops.similarity_topk import similarity_topk


class Found(NamedTuple):
    """values `[Q, k]` float32 cosines, best first; entry `[Q, k]` int64; −inf and −1 where entries run out."""

    values: Tensor
    entry: Tensor


def centred_search(queries: Tensor, entries: Tensor, k: int, *, centre_queries: bool = True) -> Found:
    """The k entries most similar to each query, by cosine after subtracting the mean of the entries.

    What all frames of a video have in common would dominate the cosine; about the mean it cancels.

    Args:
        queries: `[Q, D]`.
        entries: `[n, D]`; n = 0 finds nothing.
        k: Entries per query.
        centre_queries: Queries of the entries' own kind lose the mean as well; sentences among pictures do not.
    """
    # in float64, or entries that are all alike would be told apart by rounding
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
    """The best k of one query's results that lie at least `apart` seconds from every better one.

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
