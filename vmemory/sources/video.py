"""Read a video file, a directory of images or an array as a stream of timed frames."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vmemory.sources.pictures import SUFFIXES
from vmemory.sources.places import kind_of, place_of
from vmemory.sources.readers import ArrayReader, ImageReader, Picture, Reader, SourceError

__all__ = ["Frame", "FrameSource", "SourceError"]


class Frame(NamedTuple):
    """One frame of a stream.

    `image` is uint8 RGB `[H, W, 3]`, `time` are seconds from the start of the stream, `index` is the number of the
    emitted frame, from 0.
    """

    image: np.ndarray
    time: float
    index: int  # type: ignore[assignment]


class FrameSource:
    """Iterable of `Frame` over a video file, a film at an address, pictures or a uint8 array `[T, H, W, 3]`.

    Times are seconds from the first frame of the stream: presentation timestamps for a video (so variable frame rates
    keep their true times, and times continue if timestamps restart in the middle), `position / (fps or 1)` for a
    directory in natural order, `i / source_fps` for an array. Times strictly increase. An animated picture, alone or
    among others, plays at its own speed. Pictures of more than 8 bits are scaled: white is 65,535 for integers and 1
    for floating values; a picture with other values is stretched from its least to its greatest.

    Args:
        source: path of a video file, of a picture or of a directory of pictures; address of a film, which is read by
            its own clock as fast as possible (see `LiveSource` for live streams); or uint8 RGB array or tensor
            `[T, H, W, 3]`.
        fps: constant-rate sampling: emit the first frame at or after each multiple of `1 / fps` seconds,
            to within one tick of the container's clock; a frame is emitted once. None emits every frame.
        start, stop: emit frames with `start <= time < stop`, seconds; the sampling grid does not move.
        size: `(height, width)`, or the length of the shorter side, to scale to (bicubic) while decoding.
        source_fps: frames per second of an array.

    Attributes:
        duration: length of the whole source in seconds, None if the container does not state it; a longer iteration
            corrects it.
        expected: estimated number of frames to be emitted, or None.
        emitted: number of frames emitted by the latest iteration.
        dropped: number of pictures that are unreadable or have no time of their own.
        endless: True if an address states neither its length nor its size.
        truncated: True if the latest iteration ended before the length that the file states.
        warning: one line about a truncated or damaged source, or None.

    Video pixels are taken as stored: rotation and mirroring are applied, the sample aspect ratio is not.

    Raises:
        SourceError: the path is missing, is not a video, has no video stream, no frame or no image; an address does not
            answer within 10 s; also from the iteration, when no frame lies between `start` and `stop`.
        ValueError, TypeError: a bad argument.
    """

    def __init__(
        self,
        source: str | Path | np.ndarray | torch.Tensor,
        fps: float | None = None,
        start: float = 0.0,
        stop: float | None = None,
        size: int | tuple[int, int] | None = None,
        *,
        source_fps: float = 1.0,
    ) -> None:
        if fps is not None:
            check_rate("fps", fps)
        check_rate("source_fps", source_fps)
        if not (math.isfinite(start) and start >= 0):
            raise ValueError(f"start: expected a number of seconds >= 0, got {start}")
        if stop is not None and not stop > start:
            raise ValueError(f"stop: expected more than start ({start}), got {stop}")
        self.fps, self.start, self.stop = fps, float(start), stop
        self._reader = _open_reader(source, fps, check_size(size), source_fps)
        self.name = self._reader.name
        self.duration = self._reader.duration
        # a film that is still being sent has no end
        self.endless = getattr(self._reader, "endless", False)
        self.expected = self._estimate()
        self.emitted = 0
        self.dropped = 0
        self.truncated = False
        self.warning: str | None = None

    def _estimate(self) -> int | None:
        rate = self._reader.rate
        if self.duration is None or (self.fps is None and rate is None):
            return None
        end = self.duration if self.stop is None else min(self.stop, self.duration)
        per_second = min(x for x in (self.fps, rate) if x is not None)
        first = math.ceil(self.start * per_second - 1e-6)
        return max(0, math.ceil(end * per_second - 1e-6) - first)

    def __iter__(self) -> Iterator[Frame]:
        reader = self._reader
        self.emitted, self.truncated, self.warning = 0, False, None
        reader.broken, reader.dropped = False, 0
        reader.problems.clear()
        due = 0 if self.fps is None else math.ceil(self.start * self.fps - 1e-9)
        with closing(reader.read(self.start)) as pictures:
            for time, image in pictures:
                if self.stop is not None and time >= self.stop:
                    break
                if time < self.start:
                    continue
                if self.fps is not None:
                    # timestamps are rounded to the clock of the container, so a frame one tick early is on time
                    reached = math.floor((time + reader.tick) * self.fps)
                    if reached < due:
                        continue
                    due = reached + 1
                frame = Frame(image(), time, self.emitted)
                self.emitted += 1
                yield frame
        self.truncated, self.dropped, self.duration = reader.broken, reader.dropped, reader.duration
        if reader.problems:
            count = f"{self.emitted} frame{'' if self.emitted == 1 else 's'}"
            self.warning = f"{self.name}: {'; '.join(reader.problems)} ({count} kept)"
        if self.emitted == 0:
            window = f"from {self.start:g} s" + ("" if self.stop is None else f" to {self.stop:g} s")
            length = "" if self.duration is None else f" (the source lasts {self.duration:.1f} s)"
            problems = "".join(f"; {problem}" for problem in reader.problems)
            raise SourceError(f"{self.name}: no frame {window}{length}{problems}")

    @property
    def rate(self) -> float | None:
        """Pictures a second of the source, where it tells."""
        return self._reader.rate

    def pictures(self, start: float = 0.0) -> Generator[Picture, None, None]:
        """Yield the pictures of the source from at or before `start`, each converted only when its `image` is called.

        Here `fps`, `start` and `stop` of the source do not count. At the end `truncated`, `warning`, `dropped` and
        `duration` are as after an iteration.
        """
        reader = self._reader
        self.truncated, self.warning = False, None
        reader.broken, reader.dropped = False, 0
        reader.problems.clear()
        yield from reader.read(start)
        self.truncated, self.dropped, self.duration = reader.broken, reader.dropped, reader.duration
        if reader.problems:
            self.warning = f"{self.name}: {'; '.join(reader.problems)}"


def _open_reader(
    source: str | Path | np.ndarray | torch.Tensor,
    fps: float | None,
    size: int | tuple[int, int] | None,
    source_fps: float,
) -> Reader:
    if isinstance(source, str | Path):
        place = place_of(source)
        if isinstance(place, Path):
            if place.is_dir():
                return ImageReader.of_folder(place, fps or 1.0, size)
            if not place.is_file():
                kind = kind_of(place)
                expected = ", expected a file, a directory or an address" if place.exists() else ""
                raise SourceError(f"{place}: {kind}{expected}")
            if place.suffix.lower() in SUFFIXES:
                return ImageReader(str(place), [place], fps or 1.0, size)
        try:
            from vmemory.sources.decoder import VideoReader
        except ModuleNotFoundError as error:
            if error.name != "av":
                raise
            raise SourceError(f'{place}: reading video needs PyAV: pip install "vmemory[stream]"') from error
        return VideoReader(place, size)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if not isinstance(source, np.ndarray):
        raise TypeError(f"source: expected a path, an array or a tensor, got {type(source).__name__}")
    if source.dtype != np.uint8:
        raise ValueError(f"source: expected uint8, got {source.dtype}")
    if source.ndim != 4 or source.shape[3] != 3:
        raise ValueError(f"source: expected [T, H, W, 3], got {list(source.shape)}")
    return ArrayReader(source, source_fps, size)


def check_rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def check_size(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    if size is None:
        return None
    sides = size if isinstance(size, tuple | list) else (size,)
    if not all(isinstance(side, int) for side in sides):
        raise TypeError(f"size: expected an int or (height, width), got {size!r}")
    if len(sides) > 2 or min(sides) < 1 or (isinstance(size, tuple | list) and len(sides) != 2):
        raise ValueError(f"size: expected an int or (height, width) of at least 1, got {size!r}")
    return (sides[0], sides[1]) if len(sides) == 2 else sides[0]
