"""Merge the most similar pair of temporal neighbours into their weighted mean."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.reference.adjacent_similarity import adjacent_similarity


def adjacent_merge(bank: Tensor, size: Tensor, level: str = "frame") -> tuple[Tensor, Tensor, Tensor]:
    """Merge one pair of `bank [S, T, N, D]`, `size [S, T, N]`; return both and the pair's place `[S, N or 1]`.

    Place t means that entries t and t + 1 were merged: the pair with the largest cosine, the first of equals. NaN is
    the largest of all. Two entries of size 0 have equal weights.
    """
    S, T, N, _ = bank.shape
    similarity = adjacent_similarity(bank.detach(), level)
    if level == "frame":
        similarity = similarity[..., None]
    # a descending stable sort puts NaN first and leaves equals in order
    place = similarity.sort(dim=1, descending=True, stable=True).indices[:, 0]
    pair, entry = place.expand(S, N)[:, None], torch.arange(T - 1, device=bank.device)[:, None]
    first, second = size[:, :-1], size[:, 1:]
    total = first + second
    share = torch.where(total > 0, first / torch.where(total > 0, total, 1), 0.5)[..., None]
    wide = bank.to(torch.promote_types(bank.dtype, torch.float32))
    merged = (wide[:, :-1] * share + wide[:, 1:] * (1 - share)).to(bank.dtype)
    before, here = (entry < pair), (entry == pair)
    kept = torch.where(before[..., None], bank[:, :-1], bank[:, 1:])
    sizes = torch.where(here, total, torch.where(before, first, second))
    return torch.where(here[..., None], merged, kept), sizes, place
