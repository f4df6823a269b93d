"""Readers of every kind of source as timed pictures, which are converted on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vmemory.sources.pictures import SUFFIXES, holds_several, pictures_of


class SourceError(ValueError):
    """A source that cannot be read; the message is one line and names the source."""


class Picture(NamedTuple):
    """A decoded picture at `time` seconds; `image()` converts it to uint8 RGB `[H, W, 3]`."""

    time: float
    image: Callable[[], np.ndarray]


class Reader(Protocol):
    """The interface of a source for `FrameSource`.

    `duration` is in seconds, `rate` in pictures per second, `tick` is the resolution of the timestamps in
    seconds. `read` fills `problems` with one phrase per kind of damage, counts pictures that it could not read in
    `dropped`, and sets `broken` if pictures are missing that the source announces.
    """

    name: str
    duration: float | None
    rate: float | None
    tick: float
    broken: bool
    dropped: int
    problems: list[str]

    def read(self, start: float) -> Generator[Picture, None, None]:
        """Yield pictures in order of time, beginning at or before `start`."""
        ...


def scaled_size(height: int, width: int, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return `(height, width)` after scaling: as given, or with the shorter side equal to an int `size`."""
    if size is None:
        return height, width
    if isinstance(size, tuple):
        return size
    if height <= width:
        return size, max(1, round(width * size / height))
    return max(1, round(height * size / width)), size


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Return a sort key under which `frame9` comes before `frame10`."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _resize(image: np.ndarray, size: int | tuple[int, int] | None) -> np.ndarray:
    height, width = scaled_size(image.shape[0], image.shape[1], size)
    if (height, width) == image.shape[:2]:
        return image
    from PIL import Image

    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


class ArrayReader:
    """Reader of uint8 pictures `[T, H, W, 3]` at a constant `rate`."""

    def __init__(self, pictures: np.ndarray, rate: float, size: int | tuple[int, int] | None) -> None:
        if len(pictures) == 0:
            raise SourceError("array: no frames")
        self.name = "array"
        self.rate: float | None = rate
        self._rate = rate
        self.duration: float | None = len(pictures) / rate
        self.tick = 1e-9
        self.broken = False
        self.dropped = 0
        self.problems: list[str] = []
        self._pictures = pictures
        self._size = size

    def read(self, start: float) -> Generator[Picture, None, None]:
        first = min(max(0, int(start * self._rate) - 1), len(self._pictures))
        for i in range(first, len(self._pictures)):
            picture = self._pictures[i]
            yield Picture(i / self._rate, partial(_resize, picture, self._size))


class ImageReader:
    """Reader of picture files in order, each shown for `1 / rate` seconds; a broken file leaves a gap.

    An animation plays at its own speed, and delays the files after it. Pages are shown like files.
    """

    def __init__(self, name: str, paths: Sequence[Path], rate: float, size: int | tuple[int, int] | None) -> None:
        self._paths = paths
        self._moving = any(holds_several(path) for path in paths)
        self.name = name
        self._rate = rate
        self.rate: float | None = rate
        self.duration: float | None = None if self._moving else len(paths) / rate
        self.tick = 1e-9
        self.broken = False
        self.dropped = 0
        self.problems: list[str] = []
        self._size = size

    @classmethod
    def of_folder(cls, folder: Path, rate: float, size: int | tuple[int, int] | None) -> ImageReader:
        """Return a reader of the pictures of a directory in natural order."""
        paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
        if not paths:
            raise SourceError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in this directory")
        return cls(str(folder), sorted(paths, key=natural_key), rate, size)

    def read(self, start: float) -> Generator[Picture, None, None]:
        unreadable: list[str] = []
        # seconds by which animations have delayed the following files
        put_off = 0.0
        first = 0 if self._moving else max(0, int(start * self._rate) - 1)
        for position, path in enumerate(self._paths[first:], first):
            began = put_off + position / self._rate
            lasted = 0.0
            try:
                for image, seconds in pictures_of(path):
                    yield Picture(began + lasted, partial(_resize, image, self._size))
                    lasted += 1 / self._rate if seconds is None else seconds
            # a decoder may raise anything on a damaged or hostile file, and the other files must still be read
            except Exception as error:
                unreadable.append(f"{path.name} ({' '.join(str(error).split()) or type(error).__name__})")
            put_off += max(0.0, lasted - 1 / self._rate)
        if unreadable:
            self.dropped = len(unreadable)
            more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
            self.problems.append(f"skipped unreadable images: {', '.join(unreadable[:3])}{more}")
