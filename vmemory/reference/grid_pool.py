"""Adaptive reduction of token grids, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_pool(tokens: Tensor, size: tuple[int, int], mode: str = "area") -> Tensor:
    """`tokens [..., H, W, D]` to `[..., h, w, D]`; sums in float32 or, for float64, in float64."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    planes = wide.flatten(0, -4).movedim(-1, 1) if tokens.dim() > 3 else wide.movedim(-1, 0)[None]
    if mode == "area":
        pooled = F.adaptive_avg_pool2d(planes, size)
    else:
        pooled = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    return pooled.movedim(1, -1).reshape(*tokens.shape[:-3], *size, tokens.shape[-1]).to(tokens.dtype)
