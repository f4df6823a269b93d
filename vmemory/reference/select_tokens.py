"""Select the best tokens of each segment by sorting all tokens, and gather rows by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_tokens(scores: Tensor, budgets: Sequence[int], segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return indices `[S, sum(budgets)]` of the best of `scores [S, N]`, ascending, then −1, and their number `[S]`.

    Token n belongs to segment `segments[s, n]`, or to none if this number is outside `range(len(budgets))`. The larger
    score is kept, of equals the lower index; NaN is the largest of all.
    """
    S, N = scores.shape
    # a descending stable sort puts NaN first and leaves equals in order
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ids = torch.zeros_like(order) if segments is None else segments.expand(S, N).gather(-1, order)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    for segment, budget in enumerate(budgets):
        member = ids == segment
        chosen |= member & (member.cumsum(-1) <= budget)
    kept = torch.zeros_like(chosen).scatter(-1, order, chosen)
    places = torch.where(kept, torch.arange(N, device=scores.device), N).sort(dim=-1).values[:, : sum(budgets)]
    padding = places.new_full((S, sum(budgets) - places.shape[1]), N)
    places = torch.cat([places, padding], -1)
    return torch.where(places < N, places, -1), kept.sum(-1)


def compact(rows: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
    """Gather rows `keep [S, K]` of each tensor `[S, N, ...]`.

    For `keep` outside `range(N)`: 0 in the first tensor, −1 in the others, False for bool.
    """
    stream, moved = torch.arange(keep.shape[0], device=keep.device)[:, None], []
    for i, x in enumerate(rows):
        N = x.shape[1]
        padding = x.new_full((x.shape[0], 1, *x.shape[2:]), 0 if i == 0 or x.dtype == torch.bool else -1)
        there = (keep >= 0) & (keep < N)
        moved.append(torch.cat([x, padding], 1)[stream, torch.where(there, keep, N)])
    return moved
