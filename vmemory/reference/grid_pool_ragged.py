"""Reduction of a clip's token grids to a size per frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmemory.reference.grid_pool import grid_pool


def grid_pool_ragged(tokens: Tensor, sizes: Sequence[tuple[int, int]], mode: str = "area") -> Tensor:
    """`tokens [T, H, W, D]` to the frames' pooled tokens one after the other, `[sum h*w, D]`."""
    pooled = [grid_pool(frame, size, mode).flatten(0, 1) for frame, size in zip(tokens, sizes, strict=True)]
    return torch.cat(pooled) if pooled else tokens.reshape(0, tokens.shape[-1])
