"""Bipartite soft matching with every score stored."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-8


def grouped_rows(tokens: int, cls: int, groups: int, device: torch.device) -> Tensor:
    """Return the rows of `groups` clips in matching order: the first `cls` rows of each clip, then the others."""
    rows = torch.arange(groups * tokens, device=device).view(groups, tokens)
    return torch.cat([rows[:, :cls].flatten(), rows[:, cls:].flatten()])


def match_scores(metric: Tensor, front: int, cls: int, groups: int) -> Tensor:
    """Return cosines `[B / groups, A, B]` of even with odd rows from `front` on, in matching order."""
    rows = metric.reshape(len(metric) // groups, groups * metric.shape[1], metric.shape[2])
    rows = rows[:, grouped_rows(metric.shape[1], cls, groups, metric.device)]
    rows = rows.to(torch.promote_types(metric.dtype, torch.float32))
    rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(_EPS)
    a, b = rows[:, front + front % 2 :: 2], rows[:, front + 1 - front % 2 :: 2]
    # not a matrix product, because its order of summation depends on the row: equal rows must have equal scores
    scores = [(a[:, i, None] * b).sum(-1) for i in range(a.shape[1])]
    return torch.stack(scores, 1) if scores else rows.new_zeros(len(rows), 0, b.shape[1])


def rounded_scores(metric: Tensor, front: int, cls: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Return `match_scores` as code gives them that computes in `dtype`: rows, norms and products are rounded to it."""
    rows = metric.reshape(len(metric) // groups, groups * metric.shape[1], metric.shape[2]).to(dtype)
    rows = rows[:, grouped_rows(metric.shape[1], cls, groups, metric.device)]
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    return rows[:, front + front % 2 :: 2] @ rows[:, front + 1 - front % 2 :: 2].mT


def bipartite_match(
    metric: Tensor, r: int, front: int, cls: int, groups: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens: place and order `[B / groups, M]`, start `[B / groups, M - r + 1]` for `metric [B, N, D]`.

    M = groups · N. The first `front` rows in matching order do not merge. Each even row after them finds its best odd
    row, and the r best pairs merge: the larger score first, of equals the lower row, NaN the largest of all. The merged
    tokens are the front rows, the unmerged even rows, the odd rows. Row i is part of token `place[i]`; the rows of
    token j are `order[start[j] : start[j + 1]]`: first the row whose position the token keeps, then ascending.
    With `dtype`, scores are computed in it.
    """
    where = metric, front, cls, groups
    scores = match_scores(*where) if dtype is None else rounded_scores(*where, dtype)
    streams, evens, odds = scores.shape
    rows = grouped_rows(metric.shape[1], cls, groups, metric.device)
    merged = torch.zeros(streams, evens, dtype=torch.bool, device=metric.device)
    partner = torch.zeros(streams, evens, dtype=torch.int64, device=metric.device)
    if r > 0:
        # descending stable sorts put NaN first and leave equals in order
        best, choice = scores.sort(dim=-1, descending=True, stable=True)
        partner = choice[..., 0]
        chosen = best[..., 0].sort(dim=-1, descending=True, stable=True).indices[:, :r]
        merged = merged.scatter(1, chosen, True)
    unmerged = front + (~merged).cumsum(1) - 1
    place = torch.arange(len(rows), device=metric.device).repeat(streams, 1)
    place[:, front + front % 2 :: 2] = torch.where(merged, front + evens - r + partner, unmerged)
    place[:, front + 1 - front % 2 :: 2] = front + evens - r + torch.arange(odds, device=metric.device)
    later = torch.zeros_like(place)
    later[:, front + front % 2 :: 2] = merged.to(torch.int64)
    order = rows[(2 * place + later).sort(dim=1, stable=True).indices]
    count = torch.zeros(streams, len(rows) - r + 1, dtype=torch.int64, device=metric.device)
    start = count.scatter_add(1, place + 1, torch.ones_like(place)).cumsum(1)
    return torch.empty_like(place).scatter(1, rows.expand_as(place), place), order, start
