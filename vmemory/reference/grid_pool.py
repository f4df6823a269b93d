"""Pool token grids with channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _shuffle(tokens: Tensor, mode: str) -> Tensor:
    """Turn each 2×2 block of cells into one cell with four times the channels, in raster order; v1 swaps the axes."""
    *front, height, width, channels = tokens.shape
    blocks = tokens.reshape(*front, height // 2, 2, width // 2, 2, channels).transpose(-4, -3)
    if mode == "pixel_shuffle_v1":
        blocks = blocks.transpose(-5, -4)
    return blocks.reshape(*blocks.shape[:-3], 4 * channels)


def _bilinear(x: Tensor, dim: int, m: int) -> Tensor:
    """Apply `interpolate(align_corners=False)` along one dimension, with positions computed in integers."""
    n = x.shape[dim]
    at = ((2 * torch.arange(m, device=x.device) + 1) * n - m).clamp(min=0)
    low = (at // (2 * m)).clamp(max=n - 1)
    high = (low + 1).clamp(max=n - 1)
    weight = torch.where(low == high, 0, at - low * 2 * m).to(x.dtype) / (2 * m)
    weight = weight.view(-1, *[1] * (-dim - 1))
    first, second = x.index_select(dim, low), x.index_select(dim, high)
    return torch.where(weight == 0, first, first * (1 - weight) + second * weight)


def grid_pool(tokens: Tensor, size: tuple[int, int], mode: str = "area") -> Tensor:
    """Pool `tokens [..., H, W, D]` to `[..., h, w, D]`, with sums in float32 (float64 for float64).

    A NaN or an infinity reaches every output cell in which its weight is not 0.
    """
    if mode.startswith("pixel_shuffle"):
        return _shuffle(tokens, mode)
    shape = (*tokens.shape[:-3], *size, tokens.shape[-1])
    if tokens.numel() == 0:
        return tokens.sum((-3, -2), keepdim=True).expand(shape).clone()
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if mode == "area":
        planes = wide.unsqueeze(0).flatten(0, -4).movedim(-1, 1)
        pooled = F.adaptive_avg_pool2d(planes, size).movedim(1, -1).reshape(shape)
    else:
        pooled = _bilinear(_bilinear(wide, -3, size[0]), -2, size[1])
    return pooled.to(tokens.dtype)


def frame_stats(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `[..., D]` of `tokens [..., H, W, D]` and its norm `[...]`, whose gradient at 0 is 0."""
    mean = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mean((-3, -2))
    return mean, torch.linalg.vector_norm(mean, dim=-1)
