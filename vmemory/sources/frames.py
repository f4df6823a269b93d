"""Convert frames in any supported form to uint8 tensors with seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vmemory.sources.pictures import rgb
from vmemory.sources.video import Frame

if TYPE_CHECKING:
    from PIL.Image import Image

# one frame, several, or a source of them
FramesLike: TypeAlias = "Tensor | np.ndarray | Image | Frame | Iterable[Tensor | np.ndarray | Image | Frame]"
TimeLike = float | Sequence[float] | np.ndarray | Tensor
Timed = tuple[Tensor, list[float | None]]


def as_frames(frames: FramesLike, time: TimeLike | None = None) -> Iterator[Timed]:
    """Yield pieces of a stream as `[n, 3, H, W]` uint8, with seconds or None.

    Args:
        frames: uint8 RGB tensor or array `[n, 3, H, W]` or `[n, H, W, 3]`, one such frame, one picture, a list of
            pictures or of arrays, or an iterable of `Frame`.
        time: Seconds of each frame; not allowed with frames that have their own.

    Raises:
        TypeError, ValueError: Not frames, or the number of times differs from the number of frames.
    """
    if isinstance(frames, (str, Path)):
        raise TypeError(
            f"frames: expected frames, got {frames!r}; vmemory.sources.FrameSource reads a film or a folder, "
            "LiveSource a camera"
        )
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
    elif isinstance(frames, Iterable) and not isinstance(frames, bytes):
        if time is not None:
            raise ValueError("time: expected None with frames that bring theirs")
        for frame in frames:
            if not isinstance(frame, Frame):
                raise TypeError(f"frames: expected an iterable of Frame, got one of {type(frame).__name__}")
            yield _timed(_pixels(frame.image), frame.time)
    else:
        raise TypeError(f"frames: expected a tensor, an array, pictures or Frames, got {type(frames).__name__}")


def _is_picture(frame: Any) -> bool:
    return hasattr(frame, "convert") and hasattr(frame, "getbands")


def _pixels(frame: Any) -> Tensor:
    if _is_picture(frame):
        frame = rgb(frame)
    pixels = _tensor(frame)
    pixels = pixels[None] if pixels.dim() == 3 else pixels
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or 3 not in (pixels.shape[1], pixels.shape[3]):
        raise ValueError(
            f"frames: expected uint8 RGB [n, 3, H, W] or [n, H, W, 3], got {pixels.dtype} of shape {list(pixels.shape)}"
        )
    if not pixels.numel():
        raise ValueError(f"frames: expected at least one, of at least one pixel, got shape {list(pixels.shape)}")
    return pixels if pixels.shape[1] == 3 else pixels.permute(0, 3, 1, 2)


def _tensor(array: Any) -> Tensor:
    """Return an array as a tensor, copied if torch refuses its strides, byte order or read-only memory."""
    if isinstance(array, np.ndarray):
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    return torch.as_tensor(array)


def seconds_of(time: TimeLike) -> list[float]:
    """Return one or several numbers of seconds as a list of floats.

    Raises:
        TypeError: Not numbers.
        ValueError: NaN or infinite.
    """
    try:
        # float32, torch's default for a list of numbers, cannot represent seconds of a wall clock
        numbers = time.double() if isinstance(time, Tensor) else torch.tensor(np.asarray(time, np.float64))
        seconds: list[float] = numbers.reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"time: expected seconds as a number or numbers, such as time.time() or moment.timestamp(), got {time!r}"
        ) from None
    for value in seconds:
        if not math.isfinite(value):
            raise ValueError(f"time: expected finite seconds, got {value}")
    return seconds


def _timed(pixels: Tensor, time: Any) -> Timed:
    if time is None:
        return pixels, [None] * len(pixels)
    seconds = seconds_of(time)
    if len(seconds) != len(pixels):
        raise ValueError(f"time: expected {len(pixels)} seconds, one a frame, got {len(seconds)}")
    return pixels, list(seconds)
