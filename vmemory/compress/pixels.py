"""Measure the change of the pixels under each token from one frame to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.ops._checks import check_floating, check_pair, check_tensor, shape_of


def pixel_difference(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean absolute difference of the pixels under each token between consecutive frames.

    Args:
        pixels: `[S, T, C, h, w]`, float64, float32, float16 or bfloat16 as the model's processor normalises them
            (mean and standard deviation 0.5), or uint8, which the function normalises in the same way.
        grid: Token grid (H, W); h and w are multiples of it.

    Returns:
        `[S, T-1, H, W]` float32 (float64 for float64), size 0 in the second dimension for T < 2, the mean over channels
        and pixels, times 255. A uint8 pixel that changes by one level counts 2.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: VideoLLaMA3 (arXiv 2501.13106), the differential frame pruner.
    """
    check_tensor("pixels", pixels, "[S, T, C, h, w]")
    if pixels.dtype != torch.uint8:
        check_floating("pixels", pixels)
    H, W = check_pair("grid", grid)
    S, T, C, h, w = pixels.shape
    if C < 1 or h < H or w < W or h % H or w % W:
        raise ValueError(
            f"pixels: expected height and width to be multiples of {H} and {W}, got shape {shape_of(pixels)}"
        )
    wide = torch.float64 if pixels.dtype == torch.float64 else torch.float32
    scale = 255.0
    if pixels.dtype == torch.uint8:
        pixels, scale = pixels.to(torch.int16), 2.0
    steps = max(T - 1, 0)
    changed = (pixels[:, 1:] - pixels[:, :-1]).abs_().reshape(S, steps, C, H, h // H, W, w // W)
    return changed.mean((2, 4, 6), dtype=wide) * scale
