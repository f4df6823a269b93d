"""A camera or a network stream: always the newest frame, and a count of those nobody had time for."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from vmemory.stream._readers import SourceError
from vmemory.stream.source import Frame

# else ffmpeg looks at five seconds of a stream before it gives the first frame
_PROMPTLY = {"fflags": "nobuffer", "flags": "low_delay", "probesize": "65536", "analyzeduration": "500000"}


class LiveSource:
    """Iterable of `Frame` from what keeps coming: `rtsp://…`, `udp://…`, `tcp://…`, or a camera such as `/dev/video0`.

    A thread decodes all the time and holds one frame; while nobody takes it, a newer one replaces it. Times are seconds
    since the first frame, by the clock of this machine.

    Args:
        address: What PyAV opens; a device under `/dev` is opened as a Linux camera.
        fps: Frames a second at most.

    Attributes:
        dropped: Frames that were due and replaced by newer ones.

    Raises:
        SourceError: It cannot be opened, or has no video; also from the iteration, when the stream breaks.
    """

    def __init__(self, address: str, fps: float = 1.0) -> None:
        import av

        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps: expected a number > 0, got {fps}")
        self.name, self.fps, self.dropped = address, fps, 0
        self.duration: float | None = None
        self.warning: str | None = None
        try:
            kind = "v4l2" if address.startswith("/dev/") else None
            self._container = av.open(address, format=kind, options=_PROMPTLY)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, ValueError, IndexError) as error:
            raise SourceError(f"{address}: not a live video ({getattr(error, 'strerror', None) or error})") from error
        self._newest: Queue[Frame | Exception | None] = Queue(maxsize=1)
        self._stop = Event()
        self._worker = Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        import av

        started, due, index = math.nan, 0, 0
        try:
            for picture in self._container.decode(self._stream):
                if self._stop.is_set():
                    break
                now = clock.monotonic()
                started = now if math.isnan(started) else started
                reached = math.floor((now - started) * self.fps)
                if reached < due:
                    continue
                due = reached + 1
                self._put(Frame(picture.to_ndarray(format="rgb24"), now - started, index))
                index += 1
            last: Exception | None = None
        except av.FFmpegError as error:
            last = SourceError(f"{self.name}: {error.strerror or error}")
        except Exception as error:  # whoever iterates gets it: nobody sees what a thread raises
            last = error
        finally:
            self._container.close()
        # the last frame is still to be taken
        while not self._stop.is_set():
            try:
                self._newest.put(last, timeout=0.1)
                break
            except Full:
                continue

    def _put(self, frame: Frame) -> None:
        while True:
            try:
                self._newest.put_nowait(frame)
                return
            except Full:
                try:
                    self._newest.get_nowait()
                    self.dropped += 1
                except Empty:
                    continue

    def __iter__(self) -> Iterator[Frame]:
        self._worker.start()
        try:
            while True:
                item: Any = self._newest.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    return
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()


def open_video(video: str | Path, fps: float) -> Any:
    """A `FrameSource` of a file or folder, a `LiveSource` of anything else: an address with a scheme, or a device."""
    from vmemory.stream.source import FrameSource

    address = str(video)
    if "://" in address or address.startswith("/dev/"):
        return LiveSource(address, fps)
    return FrameSource(video, fps)
