"""Readers: every kind of source as timed pictures, converted only when they are taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


class SourceError(ValueError):
    """A source that cannot be read; the message is one line and names the source."""


class Picture(NamedTuple):
    """A decoded picture at `time` seconds; `image()` converts it to uint8 RGB `[H, W, 3]`."""

    time: float
    image: Callable[[], np.ndarray]


class Reader(Protocol):
    """What `FrameSource` needs of a source.

    `duration` is in seconds, `rate` in pictures per second, `tick` is the resolution of the timestamps in
    seconds. `read` fills `problems` with one phrase per kind of damage and sets `broken` when pictures that
    the source announces are missing.
    """

    name: str
    duration: float | None
    rate: float | None
    tick: float
    broken: bool
    problems: list[str]

    def read(self, start: float) -> Generator[Picture, None, None]:
        """Pictures in order of time, beginning at or before `start`."""
        ...


def scaled_size(height: int, width: int, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """`(height, width)` after scaling: as given, or with the shorter side equal to an int `size`."""
    if size is None:
        return height, width
    if isinstance(size, tuple):
        return size
    if height <= width:
        return size, max(1, round(width * size / height))
    return max(1, round(height * size / width)), size


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key under which `frame9` comes before `frame10`."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _resize(image: np.ndarray, size: int | tuple[int, int] | None) -> np.ndarray:
    height, width = scaled_size(image.shape[0], image.shape[1], size)
    if (height, width) == image.shape[:2]:
        return image
    from PIL import Image

    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


class ArrayReader:
    """uint8 pictures `[T, H, W, 3]` at a constant `rate`."""

    def __init__(self, pictures: np.ndarray, rate: float, size: int | tuple[int, int] | None) -> None:
        if len(pictures) == 0:
            raise SourceError("array: no frames")
        self.name = "array"
        self.rate: float | None = rate
        self._rate = rate
        self.duration: float | None = len(pictures) / rate
        self.tick = 1e-9
        self.broken = False
        self.problems: list[str] = []
        self._pictures = pictures
        self._size = size

    def read(self, start: float) -> Generator[Picture, None, None]:
        first = min(max(0, int(start * self._rate) - 1), len(self._pictures))
        for i in range(first, len(self._pictures)):
            picture = self._pictures[i]
            yield Picture(i / self._rate, lambda picture=picture: _resize(picture, self._size))  # type: ignore[misc]


class ImageReader:
    """A directory of images in natural order, one every `1 / rate` seconds; a broken image leaves its gap."""

    def __init__(self, folder: Path, rate: float, size: int | tuple[int, int] | None) -> None:
        self._paths = sorted(
            (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()),
            key=natural_key,
        )
        if not self._paths:
            raise SourceError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this directory")
        self.name = str(folder)
        self.rate: float | None = rate
        self._rate = rate
        self.duration: float | None = len(self._paths) / rate
        self.tick = 1e-9
        self.broken = False
        self.problems: list[str] = []
        self._size = size

    def read(self, start: float) -> Generator[Picture, None, None]:
        from PIL import Image, ImageOps

        unreadable: list[str] = []
        first = max(0, int(start * self._rate) - 1)
        for position, path in enumerate(self._paths[first:], first):
            try:
                with Image.open(path) as opened:
                    image = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
            except (OSError, SyntaxError):
                unreadable.append(path.name)
                continue
            yield Picture(
                position / self._rate,
                lambda image=image: _resize(image, self._size),  # type: ignore[misc]
            )
        if unreadable:
            more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
            self.problems.append(f"skipped unreadable images: {', '.join(unreadable[:3])}{more}")
