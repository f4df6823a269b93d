"""The choice of frames of a video, and those frames."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmemory.data.online.item import ItemError
from vmemory.data.world import world_of
from vmemory.sources import FrameSource, SourceError

# seconds that a container's idea of its own end may be wrong by
_TOLERANCE = 1.0


class Sampled(NamedTuple):
    """Pictures in order and their seconds in the video."""

    pictures: list[np.ndarray]
    times: list[float]
    end: float


def frame_indices(count: int, rate: float, method: str = "fps1", most: int = 64, least: int = 1) -> list[int]:
    """Select frames of a clip, as VideoChat-Online does.

    `"fps1"` takes the frame nearest to the middle of each second, `"fps2"` of each half; of two that are as near, the
    one with the even index. `"middle"` takes the middle frames of `most` equal parts. Beyond `most` frames it takes
    evenly spaced ones; below `least` the middle frames of `least` equal parts.

    Where the original takes nothing, or the same frame twice, this does not: a clip shorter than half a period gives
    its middle frame, and a video with no more frames a second than asked for gives each of its frames once.

    Args:
        count: Frames of the clip.
        rate: Frames a second.
        method: `"fps<number>"` or `"middle"`.
        most: Frames at most.
        least: Frames at least, where the clip has as many.

    Raises:
        ValueError: An unknown method, or no frames.
    """
    if count < 1:
        raise ValueError(f"count: expected at least one frame, got {count}")
    if method == "middle":
        return _middles(count, most)
    period = 1 / rate_of(method)
    if rate * period <= 1 + 1e-9:
        chosen = list(range(count))
    else:
        middles = np.arange(period / 2, count / rate + period / 2, period)
        chosen = [i for i in np.around(middles * rate).astype(int).tolist() if i < count]
    if not chosen:
        chosen = [count // 2]
    if len(chosen) < min(least, most):
        chosen = _middles(count, min(least, most))
    if len(chosen) > most:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, most).astype(int).tolist()]
    return chosen


def _middles(count: int, parts: int) -> list[int]:
    """Return the middle frames of equal parts of a clip, of one frame at least."""
    edges = np.linspace(0, count, min(parts, count) + 1).astype(int)
    return [(int(a) + int(b) - 1) // 2 for a, b in itertools.pairwise(edges)]


def rate_of(method: str) -> float:
    """Return the frames a second of a method such as `"fps1"`.

    Raises:
        ValueError: It is none.
    """
    try:
        rate = float(method.removeprefix("fps")) if method.startswith("fps") else 0.0
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1000:
        raise ValueError(f"sampling_method: expected 'middle' or 'fps' and a number, such as 'fps1', got {method!r}")
    return rate


def sample_video(
    path: Path,
    clip: tuple[float, float] | None = None,
    method: str = "fps1",
    most: int = 64,
    least: int = 1,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Sampled:
    """Decode the chosen frames of a video, and no others.

    Args:
        path: Of a video or of a folder of pictures.
        clip: Seconds that count; times stay the video's.
        method, most, least: As for `frame_indices`.
        shrink: Applied to each picture as soon as it is decoded.

    Raises:
        ItemError: It cannot be read to its end, or the clip lies outside.
    """
    try:
        source = FrameSource(path)
    except SourceError as error:
        raise ItemError(str(error).removeprefix(f"{path}: ")) from error
    rate = source.rate or 25.0
    length = source.duration
    if length is None:
        raise ItemError("video: expected one that tells how long it is, got none")
    start, end = (0.0, length) if clip is None else clip
    if clip is not None and end > length + _TOLERANCE:
        raise ItemError(f"clip: expected an end up to {length:.1f} s, got {end}")
    end = min(end, length)
    first = int(start * rate)
    chosen = [first + i for i in frame_indices(max(1, int(end * rate + 1e-6) - first), rate, method, most, least)]
    pictures: list[np.ndarray] = []
    times: list[float] = []
    wanted = iter(chosen)
    index = next(wanted)
    last = None
    # closing the generator closes the file
    reading = source.pictures(max(0.0, start - 1 / rate))
    try:
        for picture in reading:
            last = picture
            # the number by its time: what is missing in between moves nothing
            if round(picture.time * rate) < index:
                continue
            pictures.append(shrink(picture.image()) if shrink else picture.image())
            times.append(picture.time)
            position = round(picture.time * rate)
            following = next((i for i in wanted if i > position), None)
            if following is None:
                break
            index = following
    finally:
        reading.close()
    if source.truncated:
        raise ItemError(source.warning or "video: damaged")
    if not pictures and last is not None:
        # the container announced more than there is
        pictures, times = [shrink(last.image()) if shrink else last.image()], [last.time]
    if not pictures:
        raise ItemError("video: expected frames, got none")
    return Sampled(pictures, times, end)


def sample_world(
    facts: Mapping[str, Any],
    method: str = "fps1",
    most: int = 64,
    least: int = 1,
    shrink: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Sampled:
    """Draw the chosen seconds of a world, which needs no file.

    Args:
        facts: `world` of an item of `vmemory.data.world`.
        method, most, least: As for `frame_indices`, of one frame a second.
        shrink: Applied to each picture.

    Raises:
        ItemError: The facts tell of no world of this version.
    """
    try:
        world = world_of(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise ItemError(
            f"world: expected version, split, seed, seconds and pace, got {dict(facts)} ({error})"
        ) from error
    chosen = np.array(frame_indices(world.seconds, 1.0, method, most, least))
    pictures = [shrink(picture) if shrink else picture for picture in world.render(chosen)]
    return Sampled(pictures, chosen.astype(float).tolist(), float(world.seconds))


def sample_pictures(
    paths: Sequence[Path], times: Sequence[float], most: int, shrink: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[Sampled, list[int]]:
    """Read picture files, evenly spaced ones where there are more than `most`, and return the places of those taken.

    Raises:
        ItemError: A picture cannot be read.
    """
    taken = np.linspace(0, len(paths) - 1, min(most, len(paths)), dtype=int).tolist()
    pictures = []
    for i in taken:
        try:
            picture = next(iter(FrameSource(paths[i]))).image
        except SourceError as error:
            raise ItemError(str(error)) from error
        pictures.append(shrink(picture) if shrink else picture)
    return Sampled(pictures, [times[i] for i in taken], times[-1]), taken
