"""Token merging with all scores stored, as ToMe (ICLR 2023, arXiv 2210.09461, section 3) describes it.

Written from the description, in its fastest eager form: one batched product, a sort of the row maxima, gathers, and one
`scatter_reduce` for tokens and one for sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Matching(NamedTuple):
    """Rows of the even set that stay and that merge, `[B, ·, 1]`, and the partners of the latter in the odd set."""

    stay: Tensor
    leave: Tensor
    partner: Tensor


def match(metric: Tensor, r: int) -> Matching:
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)[..., None]
    leave = ranked[:, :r]
    return Matching(ranked[:, r:].sort(dim=1).values, leave, partner[..., None].gather(1, leave))


def _sum(x: Tensor, plan: Matching) -> Tensor:
    evens, odds = x[:, ::2], x[:, 1::2]
    wide = (-1, -1, x.shape[-1])
    joined = odds.scatter_reduce(1, plan.partner.expand(wide), evens.gather(1, plan.leave.expand(wide)), "sum")
    return torch.cat([evens.gather(1, plan.stay.expand(wide)), joined], 1)


def merge(x: Tensor, plan: Matching, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return size-weighted means of `x [B, N, D]` and their sizes; `size [B, N, 1]`."""
    total = _sum(size, plan)
    return _sum(x * size, plan) / total, total
