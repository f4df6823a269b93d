"""Reduction of token grids, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _shuffle(tokens: Tensor, mode: str) -> Tensor:
    """Each 2×2 block of cells becomes one cell with four times the channels, in raster order; v1 swaps the axes."""
    *front, height, width, channels = tokens.shape
    blocks = tokens.reshape(*front, height // 2, 2, width // 2, 2, channels).transpose(-4, -3)
    if mode == "pixel_shuffle_v1":
        blocks = blocks.transpose(-5, -4)
    return blocks.reshape(*blocks.shape[:-3], 4 * channels)


def grid_pool(tokens: Tensor, size: tuple[int, int], mode: str = "area") -> Tensor:
    """`tokens [..., H, W, D]` to `[..., h, w, D]`; sums in float32 or, for float64, in float64.

    A NaN reaches every output cell it is a part of, in bilinear mode also those that give it weight 0.
    """
    if mode.startswith("pixel_shuffle"):
        return _shuffle(tokens, mode)
    shape = (*tokens.shape[:-3], *size, tokens.shape[-1])
    if tokens.numel() == 0:
        return tokens.sum((-3, -2), keepdim=True).expand(shape).clone()
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    planes = wide.unsqueeze(0).flatten(0, -4).movedim(-1, 1)
    if mode == "area":
        pooled = F.adaptive_avg_pool2d(planes, size)
    else:
        pooled = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    return pooled.movedim(1, -1).reshape(shape).to(tokens.dtype)


def frame_stats(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the cells `[..., D]` of `tokens [..., H, W, D]` and its norm `[...]`; the norm's gradient at 0 is 0."""
    mean = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mean((-3, -2))
    return mean, torch.linalg.vector_norm(mean, dim=-1)
