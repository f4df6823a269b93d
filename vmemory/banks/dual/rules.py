"""Choose the slot of a full episodic memory that is overwritten; measure how evenly slots are overwritten."""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("most-similar", "bridged")
_EPS = 1e-8


def bridged_slot(means: Tensor, entry: Tensor, mean: Tensor) -> Tensor:
    """Return the slot of a full memory whose neighbours in time are most similar to each other.

    The slots are put in the order of their frames, and the new frame last. The score of a slot is the cosine of its two
    neighbours: the higher it is, the less is lost without the slot. Of equal scores the earlier slot leaves. The first
    frame stays unless it is alone. A slot that is not finite leaves first.

    Args:
        means: `[S, M, D]` means of the slots, float32 or better, M at least 1.
        entry: `[S, M]` int64 frame of each slot.
        mean: `[S, D]` mean of the new frame.

    Returns:
        `[S]` int64.
    """
    order = entry.argsort(1)
    held = means.gather(1, order[..., None].expand_as(means))
    x = torch.cat([held, mean[:, None]], 1)
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    bridges = (x[:, :-2] * x[:, 2:]).sum(-1).nan_to_num(nan=-2.0)
    scores = torch.cat([torch.full_like(x[:, :1, 0], -3.0), bridges], 1)
    scores = torch.where(held.isfinite().all(-1), scores, torch.inf)
    place = scores.sort(dim=1, descending=True, stable=True).indices[:, :1]
    return order.gather(1, place)[:, 0]


def overwrite_entropy(overwrites: Tensor) -> Tensor:
    """Return how evenly the slots of a memory are overwritten: the entropy of the overwrites over the slots, in bits.

    0 = always the same slot, so the others never change; log2(M) = each of the M slots equally often.

    Args:
        overwrites: `[..., M]` how often each slot was overwritten, integers or floats, not negative.

    Returns:
        `[...]` float64; NaN where nothing was overwritten.

    Raises:
        TypeError: No tensor.
        ValueError: No dimension.
    """
    if not isinstance(overwrites, Tensor):
        raise TypeError(f"overwrites: expected a tensor [..., M], got {type(overwrites).__name__}")
    if overwrites.dim() == 0:
        raise ValueError("overwrites: expected a tensor [..., M], got shape []")
    share = overwrites.double() / overwrites.sum(-1, keepdim=True)
    # x·log2(1/x) instead of −x·log2(x): the entropy of one certain slot is 0, not −0
    bits = torch.where(share == 0, 0, share * share.reciprocal().log2()).sum(-1)
    return torch.where(overwrites.sum(-1) > 0, bits, torch.nan)
