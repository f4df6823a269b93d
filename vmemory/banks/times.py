"""Seconds as callers give them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmemory.ops._checks import shape_of

Times = float | Sequence[float] | Tensor | None


def as_times(time: float | Sequence[float] | Tensor, streams: int, frames: int) -> Tensor:
    """Times of T frames of S streams as `[S, T]` float64.

    Raises:
        ValueError: Not float64, or not one number a frame.
    """
    times = time if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)
    if times.dtype != torch.float64:
        raise ValueError(f"time: expected float64 seconds, got {times.dtype}")
    if times.dim() == 0 and frames == 1:
        times = times[None]
    if times.shape not in ((frames,), (streams, frames)):
        raise ValueError(f"time: expected shape [{frames}] or [{streams}, {frames}], got {shape_of(times)}")
    return times.expand(streams, frames).contiguous()
