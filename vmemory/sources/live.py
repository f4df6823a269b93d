"""Read a camera or a network stream: always the newest frame, with a count of the skipped ones."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from vmemory.sources.places import place_of, shown
from vmemory.sources.readers import SourceError
from vmemory.sources.video import Frame, FrameSource, check_rate, check_size

# by default ffmpeg analyses five seconds of a stream before the first frame
_PROMPTLY = {"flags": "low_delay", "probesize": "65536", "analyzeduration": "500000"}
# schemes that send live video only
_SENDERS = frozenset(("mms", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp", "unix"))
# seconds before the first attempt to reconnect; each further attempt waits twice as long
_PAUSE = 0.5


class LiveSource:
    """Iterable of `Frame` from a live source: `rtsp://…`, `udp://…`, `tcp://…`, or a camera such as `/dev/video0`.

    A thread decodes continuously and holds one frame, which a newer frame replaces if the caller has not taken it.
    Times are seconds since the first frame, by the clock of this machine. A connection that breaks or stays silent is
    opened again, and times continue. The iteration ends when the sender ends the stream. Each iteration connects again.

    Args:
        address: An address that PyAV opens; a device under `/dev`, or its number, is opened as a Linux camera.
        fps: Frames a second at most.
        size: `(height, width)`, or the length of the shorter side, to scale to; None = as sent.
        timeout: Seconds of silence after which a connection counts as broken.
        reconnects: Consecutive attempts to open a broken connection again before the iteration raises.

    Attributes:
        dropped: Number of due frames of the latest iteration that newer frames replaced.

    Raises:
        SourceError: The source cannot be opened, stays silent, or has no video; also from the iteration, if the stream
            breaks and cannot be opened again.
        ValueError, TypeError: A bad argument.
    """

    def __init__(
        self,
        address: str | Path | int,
        fps: float = 1.0,
        size: int | tuple[int, int] | None = None,
        *,
        timeout: float = 10.0,
        reconnects: int = 3,
    ) -> None:
        if isinstance(address, bool) or not isinstance(address, (str, Path, int)):
            raise TypeError(f"address: expected an address, a path or a camera's number, got {address!r}")
        if isinstance(address, int) and address < 0:
            raise ValueError(f"address: expected a camera's number >= 0, got {address}")
        check_rate("fps", fps)
        check_rate("timeout", timeout)
        if reconnects < 0:
            raise ValueError(f"reconnects: expected at least 0, got {reconnects}")
        self._place = place_of(address)
        self.name, self.fps, self.size = shown(self._place), fps, check_size(size)
        self.timeout, self.reconnects = timeout, reconnects
        self.dropped = 0
        self.duration: float | None = None
        # an address without an answer is an error here, not at the first frame
        self._opened: Any = self._open()
        self._running: _Reading | None = None

    @property
    def warning(self) -> str | None:
        """One line about skipped frames, or None."""
        count = f"{self.dropped} frame{'' if self.dropped == 1 else 's'}"
        return f"{self.name}: {count} skipped, because newer ones arrived first" if self.dropped else None

    def _open(self) -> Any:
        import av

        began = clock.monotonic()
        try:
            camera = isinstance(self._place, Path) and self._place.is_char_device()
            url = f"file:{self._place}" if isinstance(self._place, Path) and not camera else str(self._place)
            container = av.open(url, format="v4l2" if camera else None, options=_PROMPTLY, timeout=self.timeout)
            if not container.streams.video:
                container.close()
                raise SourceError(f"{self.name}: not a live video (no video stream)")
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, SourceError):
                raise
            silent = clock.monotonic() - began >= self.timeout
            reason = f"silent for {self.timeout:g} s" if silent else getattr(error, "strerror", None) or error
            raise SourceError(f"{self.name}: not a live video ({reason})") from error
        return container

    def __iter__(self) -> Iterator[Frame]:
        container, self._opened = self._opened, None
        self.dropped = 0
        self._running = reading = _Reading(self, container or self._open())
        try:
            yield from reading
        finally:
            reading.stop()

    def close(self) -> None:
        """Stop reading."""
        if self._running is not None:
            self._running.stop()
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class _Reading:
    """One iteration over a live source: a decoding thread, and its newest frame."""

    def __init__(self, source: LiveSource, container: Any) -> None:
        from vmemory.sources.decoder import Upright

        self._source, self._container = source, container
        self._image = Upright(source.size)
        self._newest: Queue[Frame | Exception | None] = Queue(maxsize=1)
        self._stop = Event()
        self._sign = clock.monotonic()
        self._started, self._due, self._index = math.nan, 0, 0
        # attempts since the last picture
        self._tried = 0
        Thread(target=self._read, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def __iter__(self) -> Iterator[Frame]:
        timeout = self._source.timeout
        while True:
            try:
                item = self._newest.get(timeout=min(1.0, timeout))
            except Empty:
                if self._stop.is_set():
                    return
                # a device may block in a call that has no timeout
                if clock.monotonic() - self._sign > 2 * timeout:
                    raise SourceError(f"{self._source.name}: silent for {2 * timeout:g} s") from None
                continue
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item

    def _read(self) -> None:
        last: Exception | None = None
        try:
            while (broken := self._follow()) is not None and not self._stop.is_set():
                self._connect_again(broken)
        except Exception as error:  # raised again in the iteration, because an exception of a thread is not seen
            last = error
        finally:
            self._container.close()
        # wait until the last frame is taken
        while not self._stop.is_set():
            try:
                self._newest.put(last, timeout=0.1)
                break
            except Full:
                continue

    def _follow(self) -> str | None:
        """Take frames until stopped or the sender ends (return None), or the connection breaks (return the reason)."""
        import av

        from vmemory.sources.decoder import decoded

        stream = self._container.streams.video[0]
        packets = self._container.demux(stream)
        seen = clock.monotonic()
        while not self._stop.is_set():
            asked = self._sign = clock.monotonic()
            try:
                packet = next(packets)
            except StopIteration:
                return None
            except av.FFmpegError as error:
                silent = clock.monotonic() - asked >= self._source.timeout
                return f"silent for {self._source.timeout:g} s" if silent else str(error.strerror or error)
            for picture in decoded((packet,), []):
                seen = clock.monotonic()
                self._take(picture)
            if clock.monotonic() - seen > self._source.timeout:
                return f"no picture for {self._source.timeout:g} s"
        return None

    def _connect_again(self, broken: str) -> None:
        self._container.close()
        while self._tried < self._source.reconnects:
            self._sign = clock.monotonic()
            if self._stop.wait(_PAUSE * 2**self._tried):
                return
            self._tried += 1
            self._sign = clock.monotonic()
            try:
                self._container = self._source._open()
                return
            except SourceError as error:
                broken = str(error).removeprefix(f"{self._source.name}: ")
        raise SourceError(f"{self._source.name}: {broken}")

    def _take(self, picture: Any) -> None:
        now = clock.monotonic()
        self._tried = 0
        if math.isnan(self._started):
            self._started = now
        reached = math.floor((now - self._started) * self._source.fps)
        if reached < self._due:
            return
        self._due = reached + 1
        frame = Frame(self._image(picture), now - self._started, self._index)
        self._index += 1
        while True:
            try:
                self._newest.put_nowait(frame)
                return
            except Full:
                try:
                    self._newest.get_nowait()
                    self._source.dropped += 1
                except Empty:
                    continue


def open_video(
    video: str | Path | int, fps: float, size: int | tuple[int, int] | None = None
) -> FrameSource | LiveSource:
    """Open a `FrameSource` for a file or a film at an address, or a `LiveSource` for a live stream.

    Raises:
        SourceError, ValueError, TypeError: See there.
    """
    place = place_of(video)
    if isinstance(place, Path):
        return LiveSource(place, fps, size) if place.is_char_device() else FrameSource(place, fps, size=size)
    if place.partition("://")[0].lower() in _SENDERS:
        return LiveSource(place, fps, size)
    film = FrameSource(place, fps, size=size)
    return LiveSource(place, fps, size) if film.endless else film
