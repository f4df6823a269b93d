"""Frames in whatever form they come, as uint8 tensors with seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmemory.stream.pictures import rgb
from vmemory.stream.source import Frame

Timed = tuple[Tensor, list[float | None]]


def as_frames(frames: Any, time: Any = None) -> Iterator[Timed]:
    """Pieces of a stream as `[n, 3, H, W]` uint8 and seconds, None where nobody tells.

    Args:
        frames: uint8 RGB tensor or array `[n, 3, H, W]` or `[n, H, W, 3]`, one such frame, one picture, a list of
            pictures or of arrays, or an iterable of `Frame`.
        time: Seconds of each; not with frames that bring theirs.

    Raises:
        TypeError, ValueError: Not frames, or as many times as frames are missing.
    """
    if isinstance(frames, Frame):
        frames = [frames]
    if isinstance(frames, (Tensor, np.ndarray)) or _is_picture(frames):
        yield _timed(_pixels(frames), time)
    elif isinstance(frames, (list, tuple)) and not any(isinstance(f, Frame) for f in frames):
        if not frames:
            raise ValueError("frames: expected at least one, got none")
        pixels = [_pixels(f) for f in frames]
        sizes = sorted({tuple(p.shape[2:]) for p in pixels})
        if len(sizes) > 1:
            raise ValueError(f"frames: expected one size, got {sizes[0]} and {sizes[1]}")
        yield _timed(torch.cat(pixels), time)
    elif isinstance(frames, Iterable) and not isinstance(frames, (str, bytes)):
        if time is not None:
            raise ValueError("time: expected None with frames that bring theirs")
        for frame in frames:
            if not isinstance(frame, Frame):
                raise TypeError(f"frames: expected an iterable of Frame, got one of {type(frame).__name__}")
            yield _pixels(frame.image), [float(frame.time)]
    else:
        raise TypeError(f"frames: expected a tensor, an array, pictures or Frames, got {type(frames).__name__}")


def _is_picture(frame: Any) -> bool:
    return hasattr(frame, "convert") and hasattr(frame, "getbands")


def _pixels(frame: Any) -> Tensor:
    if _is_picture(frame):
        frame = rgb(frame)
    pixels = torch.as_tensor(frame)
    pixels = pixels[None] if pixels.dim() == 3 else pixels
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or 3 not in (pixels.shape[1], pixels.shape[3]):
        raise ValueError(
            f"frames: expected uint8 RGB [n, 3, H, W] or [n, H, W, 3], got {pixels.dtype} of shape {list(pixels.shape)}"
        )
    if not pixels.numel():
        raise ValueError(f"frames: expected at least one, of at least one pixel, got shape {list(pixels.shape)}")
    return pixels if pixels.shape[1] == 3 else pixels.permute(0, 3, 1, 2)


def _timed(pixels: Tensor, time: Any) -> Timed:
    if time is None:
        return pixels, [None] * len(pixels)
    seconds = torch.as_tensor(time, dtype=torch.float64).reshape(-1).tolist()
    if len(seconds) != len(pixels):
        raise ValueError(f"time: expected {len(pixels)} seconds, one a frame, got {len(seconds)}")
    return pixels, seconds
