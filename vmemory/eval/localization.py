"""Localise a moment: search an image in a memory whose entries have times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def localize(queries: Tensor, entries: Tensor, time: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return the time `[Q]` float64 of the entry most similar to each query, by cosine about a mean.

    Args:
        queries: `[Q, D]`.
        entries: `[M, D]`, M at least 1; equal similarities go to the lower index.
        time: `[M]` seconds.
        mean: `[D]`, the origin of the cosine for queries and entries alike; None takes the mean of `entries`.

    Raises:
        ValueError: shapes do not fit.
    """
    if queries.dim() != 2 or entries.dim() != 2 or queries.shape[1] != entries.shape[1]:
        raise ValueError(
            f"queries, entries: expected [Q, D] and [M, D], got {list(queries.shape)} and {list(entries.shape)}"
        )
    if len(entries) == 0 or time.shape != entries.shape[:1]:
        raise ValueError(f"time: expected [M] with M = {len(entries)} > 0, got {list(time.shape)}")
    origin = entries.float().mean(0) if mean is None else mean.float()
    similarity = F.normalize(queries.float() - origin, dim=-1) @ F.normalize(entries.float() - origin, dim=-1).T
    # argmax guarantees no order among equal values
    slots = torch.arange(len(entries)).expand_as(similarity)
    best = slots.where(similarity == similarity.amax(1, keepdim=True), len(entries)).amin(1)
    return time.double()[best]


def hit_rate(found: Tensor, truth: Sequence[float] | Tensor, tolerance: float) -> float:
    """Return the share of `found` `[Q]` seconds within `tolerance` seconds of `truth` `[Q]`."""
    wanted = torch.as_tensor(truth, dtype=torch.float64)
    if found.shape != wanted.shape or found.dim() != 1 or len(wanted) == 0:
        raise ValueError(f"found: expected {list(wanted.shape)}, at least one, got {list(found.shape)}")
    return float(((found - wanted).abs() <= tolerance).double().mean())
