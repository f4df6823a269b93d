"""Push frames of a source into a memory, with a progress bar, until the end or Ctrl-C."""

from __future__ import annotations

import signal
import time as clock
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status
from rich.text import Text
from torch import Tensor

from vmemory.banks import format_bytes
from vmemory.cli.common import timecode
from vmemory.cli.terminal import Terminal, one_line
from vmemory.search.encoder import Encoder, calibrate
from vmemory.search.video_search import VideoSearch
from vmemory.sources import Frame, FrameSource, SourceError
from vmemory.sources.places import name_of, place_of


class Watched(NamedTuple):
    """The result of pushing a source.

    decode, wall: seconds for decoding and in total; interrupted: the user pressed Ctrl-C; broken: the reason why a
    source ended early, or None.
    """

    decode: float
    wall: float
    interrupted: bool
    broken: str | None = None


class Stop:
    """A flag that the first Ctrl-C sets; the second one ends the program."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Catch Ctrl-C within a context, so that a loop can end between two batches."""
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def watch(
    memory: VideoSearch,
    frames: Iterable[Frame],
    *,
    batch: int,
    duration: float | None,
    name: str,
    push: Callable[[list[Frame]], None] | None = None,
) -> Watched:
    """Push all frames into a memory.

    Args:
        memory: The memory; the progress bar shows its state.
        frames: Frames of the source.
        batch: Frames per push.
        duration: Seconds of the whole source, if known.
        name: Name to show before the bar.
        push: Function that is called with each batch, instead of the memory's `push`.
    """
    take = push or memory.push
    columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TextColumn("{task.fields[state]}"))
    started, decode, count = clock.perf_counter(), 0.0, 0
    console = Terminal(stderr=True)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with stop_on_interrupt() as stop, shown as bar:
        task = bar.add_task(one_line(name), total=duration, state="")
        waiting = kept = frames if isinstance(frames, Kept) else Kept(frames)
        while not stop.asked:
            began = clock.perf_counter()
            group = _next(waiting, batch, stop)
            decode += clock.perf_counter() - began
            if not group:
                break
            take(group)
            count += len(group)
            rate = count / (clock.perf_counter() - started)
            bar.update(task, completed=group[-1].time, state=_state(memory, group[-1].time, duration, rate))
    return Watched(decode, clock.perf_counter() - started, stop.asked, kept.broken)


class Kept:
    """Frames of a source up to an error, which is kept and not raised.

    Attributes:
        broken: The reason why the source ended early, or None.
    """

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames = iter(frames)
        self._back: list[Frame] = []
        self._given = False
        self.broken: str | None = None

    def __iter__(self) -> Iterator[Frame]:
        return self

    def put_back(self, frames: Sequence[Frame]) -> None:
        """Put frames back to the front of the iteration."""
        self._back = [*frames, *self._back]

    def __next__(self) -> Frame:
        if self._back:
            return self._back.pop(0)
        try:
            frame = next(self._frames)
        except SourceError as error:
            if not self._given:
                raise
            self.broken = str(error)
            raise StopIteration from None
        self._given = True
        return frame


def origin_of(encoder: Encoder, video: str | Path, fps: float, seconds: float, size: int) -> Tensor:
    """Return the mean token `[D]` of the first seconds of a video, which are decoded for this purpose."""
    with _calibrating(seconds, name_of(place_of(video))):
        return calibrate(encoder, FrameSource(video, fps, stop=seconds, size=size))


def live_origin_of(encoder: Encoder, frames: Kept, seconds: float, name: str) -> Tensor:
    """Return the mean token `[D]` of the first seconds of a live source; these frames are put back."""
    first = []
    with _calibrating(seconds, name):
        for frame in frames:
            first.append(frame)
            if frame.time >= seconds:
                break
        frames.put_back(first)
        return calibrate(encoder, first)


def _calibrating(seconds: float, name: str) -> Status:
    return Terminal(stderr=True).status(Text(one_line(f"calibrating on the first {seconds:g} s of {name}")))


def _next(frames: Iterator[Frame], batch: int, stop: Stop) -> list[Frame]:
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == batch or stop.asked:
            break
    return group


def _state(memory: VideoSearch, time: float, duration: float | None, rate: float) -> str:
    end = "" if duration is None else f" of {timecode(duration)}"
    used, size = format_bytes(memory.bytes_in_use), format_bytes(memory.bank.nbytes)
    return f"{timecode(time)}{end}  {rate:.1f} frames/s  {used} of {size}"
