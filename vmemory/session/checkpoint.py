"""Check the plain values in a session's file before they are used."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmemory.banks.state import MOST_FRAMES

# upper bounds for the pixels of a frame and of a side, above the input sizes of vision towers
_MOST_PIXELS, _MOST_SIDE = 2**24, 2**14


class SessionNotes(NamedTuple):
    """The plain values of a session; see `VideoSession`."""

    frames: int
    last: float
    fps: float
    frame_size: tuple[int, int] | None
    grid: tuple[int, int]
    time_origin: str | float
    waiting: tuple[float, ...]
    step: float
    short_stream: dict[str, Any]
    start: float | None
    model_type: str

    @classmethod
    def of(cls, notes: Any) -> SessionNotes:
        """Check and return the notes of a file.

        Raises:
            ValueError: `VideoSession.save` cannot have written these values.
        """
        if not isinstance(notes, dict) or set(notes) != set(cls._fields):
            raise ValueError(f"session: expected {', '.join(cls._fields)}, got {_brief(notes)}")
        origin, start = notes["time_origin"], notes["start"]
        if origin not in ("start", "oldest"):
            origin = number("session.time_origin", origin, -math.inf)
        if not isinstance(notes["model_type"], str):
            raise ValueError(f"session.model_type: expected a name, got {_brief(notes['model_type'])}")
        waiting, short = notes["waiting"], notes["short_stream"]
        if not isinstance(waiting, list):
            raise ValueError(f"session.waiting: expected seconds, got {_brief(waiting)}")
        seconds = tuple(number("session.waiting", t, -math.inf) for t in waiting)
        # −inf = nothing was pushed
        last = -math.inf if notes["last"] == -math.inf else number("session.last", notes["last"], -math.inf)
        if any(not a < b for a, b in pairwise(seconds)) or (seconds and seconds[-1] > last):
            raise ValueError(f"session.waiting: expected increasing seconds up to {last}, got {_brief(waiting)}")
        if not isinstance(short, dict):
            raise ValueError(f"session.short_stream: expected names and values, got {_brief(short)}")
        size = notes["frame_size"]
        return cls(
            frames=integer("session.frames", notes["frames"], MOST_FRAMES),
            last=last,
            fps=number("session.fps", notes["fps"], math.ulp(0.0)),
            frame_size=None if size is None else frame_size(size),
            grid=_pair("session.grid", notes["grid"], MOST_FRAMES),
            time_origin=origin,
            waiting=seconds,
            step=number("session.step", notes["step"], 0.0),
            short_stream=short,
            start=None if start is None else number("session.start", start, -math.inf),
            model_type=notes["model_type"],
        )

    def frames_waiting(self, extra: dict[str, Tensor], together: int) -> list[tuple[Tensor, float]]:
        """Return the frames that wait for their group to be complete, with their seconds.

        Raises:
            ValueError: The tensors are not pictures, differ in number from the seconds, or are too many.
        """
        if not self.waiting:
            return []
        pictures, n = extra.get("waiting"), len(self.waiting)
        if pictures is None or pictures.dim() != 4 or pictures.shape[:2] != (n, 3) or pictures.dtype != torch.uint8:
            got = "none" if pictures is None else f"{list(pictures.shape)} {pictures.dtype}"
            raise ValueError(f"waiting: expected {n} uint8 pictures [{n}, 3, H, W], got {got}")
        if n >= together or not pictures.numel():
            raise ValueError(f"waiting: expected fewer than {together} frames with pixels, got {list(pictures.shape)}")
        return list(zip(pictures, self.waiting, strict=True))


def frame_size(size: Any) -> tuple[int, int]:
    """Check and return (H, W) in pixels.

    Raises:
        ValueError: Not two numbers, or too large.
    """
    height, width = _pair("frame_size", size, _MOST_SIDE)
    if height * width > _MOST_PIXELS:
        raise ValueError(f"frame_size: expected at most 2^24 pixels, got {(height, width)}")
    return height, width


def integer(name: str, value: Any, most: int) -> int:
    """Check and return an integer from 0 to `most`.

    Raises:
        ValueError: Something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name}: expected 0 to {most}, got {_brief(value)}")
    return value


def number(name: str, value: Any, least: float) -> float:
    """Check and return a finite number of at least `least`.

    Raises:
        ValueError: Something else.
    """
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    # an int may exceed the range of floats
    if not plain or not least <= value <= 1e300 or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number of at least {least:g}, got {_brief(value)}")
    return float(value)


def _pair(name: str, value: Any, most: int) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{name}: expected (H, W), got {_brief(value)}")
    if 0 in (sides := tuple(integer(name, side, most) for side in value)):
        raise ValueError(f"{name}: expected sides of at least 1, got {_brief(value)}")
    return sides[0], sides[1]


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python limits the digits of an int in text
        return "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:80]}…"
