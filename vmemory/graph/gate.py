"""Scores that decide whether a frame is worth remembering."""

from __future__ import annotations

import torch
from torch import Tensor


def perstream_scores(frames: Tensor, categories: Tensor) -> Tensor:
    """Score frames as PerStream's remember gate: cosines with all categories, divided by their own Euclidean norm.

    The largest of C scores is at least C^−½ where the largest cosine by magnitude is positive, whatever the frame
    shows: the division removes how similar it is.

    Args:
        frames: `[N, D]` or `[N, P, D]`, projected patches, whose mean counts; floating point.
        categories: `[C, D]`, vectors of `Category.sentence`, on the same device.

    Returns:
        `[N, C]` float32. A frame is remembered if its largest score exceeds gamma, under the category of that score.

    Raises:
        ValueError: The shapes do not fit.
    """
    if frames.dim() not in (2, 3) or categories.dim() != 2 or frames.shape[-1] != categories.shape[1]:
        raise ValueError(
            f"frames, categories: expected [N, D] or [N, P, D] and [C, D], got {list(frames.shape)} and "
            f"{list(categories.shape)}"
        )
    pooled = frames.float().mean(1) if frames.dim() == 3 else frames.float()
    unit = torch.nn.functional.normalize
    return unit(unit(pooled, dim=-1) @ unit(categories.float(), dim=-1).T, dim=-1)
