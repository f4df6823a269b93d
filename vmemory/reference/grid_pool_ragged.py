"""Pool the token grids of a clip, each frame to a size of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmemory.reference.grid_pool import grid_pool


def grid_pool_ragged(tokens: Tensor, sizes: Sequence[tuple[int, int]], mode: str = "area") -> Tensor:
    """Pool each frame of `tokens [T, H, W, D]` and concatenate the results, `[sum h*w, D]`."""
    pooled = [grid_pool(frame, size, mode).flatten(0, 1) for frame, size in zip(tokens, sizes, strict=True)]
    return torch.cat(pooled) if pooled else tokens.reshape(0, tokens.shape[-1])
