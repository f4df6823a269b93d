"""Frames flow from a source into a memory, with a progress bar, until they end or someone presses Ctrl-C."""

from __future__ import annotations

import signal
import time as clock
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from vmemory.banks import format_bytes
from vmemory.cli.common import timecode
from vmemory.stream import Frame, FrameSource
from vmemory.stream.encoder import Encoder, calibrate
from vmemory.stream.memory_stream import MemoryStream


class Watched(NamedTuple):
    """decode, wall: seconds spent on decoding and altogether; interrupted: someone pressed Ctrl-C."""

    decode: float
    wall: float
    interrupted: bool


class Stop:
    """Set by the first Ctrl-C; the second one ends the program."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Ctrl-C ends the loop between two batches instead of in the middle of one."""
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def watch(
    memory: MemoryStream,
    frames: Iterable[Frame],
    *,
    batch: int,
    duration: float | None,
    name: str,
    push: Callable[[list[Frame]], None] | None = None,
) -> Watched:
    """Push all frames into a memory.

    Args:
        memory: Whose state the progress bar shows.
        frames: From the source.
        batch: Frames a push.
        duration: Seconds of the whole, if known.
        name: Shown before the bar.
        push: Takes the batches instead of the memory itself.
    """
    take = push or memory.push
    columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[state]}"))
    started, decode, count = clock.perf_counter(), 0.0, 0
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with stop_on_interrupt() as stop, shown as bar:
        task = bar.add_task(name, total=duration, state="")
        waiting = iter(frames)
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
    return Watched(decode, clock.perf_counter() - started, stop.asked)


def origin_of(encoder: Encoder, video: Path, fps: float, seconds: float, size: int) -> Tensor:
    """Mean token `[D]` of the first seconds of a video, which are decoded for it alone."""
    console = Console(stderr=True)
    with console.status(f"calibrating on the first {seconds:g} s of {video.name}"):
        return calibrate(encoder, FrameSource(video, fps, stop=seconds, size=size))


def _next(frames: Iterator[Frame], batch: int, stop: Stop) -> list[Frame]:
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == batch or stop.asked:
            break
    return group


def _state(memory: MemoryStream, time: float, duration: float | None, rate: float) -> str:
    end = "" if duration is None else f" of {timecode(duration)}"
    used, size = format_bytes(memory.bytes_in_use), format_bytes(memory.bank.nbytes)
    return f"{timecode(time)}{end}  {rate:.1f} frames/s  {used} of {size}"
