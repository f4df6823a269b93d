"""Decode video files with PyAV: presentation timestamps, scaling during conversion, reports of damage."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vmemory.sources.places import shown
from vmemory.sources.readers import Picture, SourceError, scaled_size

# seconds without an answer from an address before an error
PATIENCE = 10.0
# a clock that goes back by this many seconds has restarted; a jump ahead by this many seconds in a playlist, too
_ANEW, _AHEAD = 0.1, 10.0
# libav's AVFMT_TS_DISCONT
_CLOCK_MAY_RESTART = 0x200
# containers that declare the time of their end, not how long they last
_DECLARE_THEIR_END = frozenset(("asf", "matroska,webm", "nut"))
# containers made of pieces with independent clocks
_PLAYLISTS = frozenset(("concat", "dash", "hls"))


def reason_of(error: Exception) -> str:
    """Return libav's reason for an error in a few words."""
    if isinstance(error, av.error.ExitError):
        return f"no answer within {PATIENCE:g} s"
    return getattr(error, "strerror", None) or str(error)


def decoded(packets: Iterable[av.Packet], errors: list[str]) -> Iterator[av.VideoFrame]:
    """Yield the frames of packets; a damaged packet is added to `errors` and does not lose the frames after it."""
    for packet in packets:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            errors.append(reason_of(error))
            continue
        yield from frames


class Upright:
    """Convert decoded frames to uint8 RGB `[H, W, 3]`, rotated and mirrored by their display matrix.

    Args:
        size: `(height, width)` of the result, or the length of its shorter side; None = as decoded.
    """

    def __init__(self, size: int | tuple[int, int] | None) -> None:
        self._size = size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        across, mirrored, flipped = _display(frame)
        size = self._size
        if isinstance(size, tuple) and across:
            size = (size[1], size[0])
        height, width = scaled_size(frame.height, frame.width, size)
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        image = rgb.to_ndarray()
        if across:
            image = image.transpose(1, 0, 2)
        return np.ascontiguousarray(image[:: -1 if flipped else 1, :: -1 if mirrored else 1])


def _display(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to transpose a frame, mirror it left to right, and flip it upside down, in this order."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # x' = a x + c y and y' = b x + d y, in the order a, b, u, c, d, v
    a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


class VideoReader:
    """Reader of the first real video stream of a file or of a film at an address.

    Times are presentation timestamps in seconds, rebased so that the first one is 0; streams without timestamps count
    the frame durations. If timestamps restart in the middle, as in concatenated recordings, times continue from the end
    of the previous part. Any other frame whose time does not increase is left out and counted.

    Args:
        place: A file, or an address with its scheme.
        size: See `scaled_size`.
    """

    def __init__(self, place: str | Path, size: int | tuple[int, int] | None) -> None:
        self.name = shown(place)
        # a file name may contain colons, which ffmpeg would read as a protocol
        self._url = place if isinstance(place, str) else f"file:{place}"
        self.broken = False
        self.dropped = 0
        self.problems: list[str] = []
        self._image = Upright(size)
        with self._open() as container:
            stream = self._stream(container)
            if stream.codec_context is None:
                raise SourceError(f"{self.name}: no decoder for its video stream")
            rate = stream.average_rate or stream.guessed_rate
            self.rate: float | None = float(rate) if rate else None
            self.tick = float(stream.time_base or 0) + 1e-9
            self.duration: float | None = self._declared_duration(container, stream)
            # a stream without an end has neither a length nor a size
            self.endless = self.duration is None and (container.format.name in _PLAYLISTS or container.size <= 0)
            self._restarts = bool(container.format.flags & _CLOCK_MAY_RESTART)
            self._origin = self._first_pts(container, stream)
            if self.duration and self._origin and stream.time_base and container.format.name in _DECLARE_THEIR_END:
                self.duration = max(0.0, self.duration - float(self._origin * stream.time_base))

    def _open(self) -> av.container.InputContainer:
        try:
            container = av.open(self._url, timeout=None if self._url.startswith("file:") else PATIENCE)
        except (av.FFmpegError, ValueError) as error:
            raise SourceError(f"{self.name}: not a readable video file ({reason_of(error)})") from error
        # ffmpeg renders any text file as a video of a terminal
        if container.format.name == "tty":
            container.close()
            raise SourceError(f"{self.name}: not a video file (plain text)")
        return container

    def _stream(self, container: av.container.InputContainer) -> av.VideoStream:
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic:
                stream.thread_type = "AUTO"
                return stream
        raise SourceError(f"{self.name}: no video stream")

    def _declared_duration(self, container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
        declared = []
        if stream.duration and stream.time_base:
            declared.append(float(stream.duration * stream.time_base))
        if stream.frames and stream.average_rate:
            declared.append(float(stream.frames / stream.average_rate))
        for key, text in stream.metadata.items():
            if key.upper().startswith("DURATION") and re.fullmatch(r"\d{1,6}:\d{1,2}:\d{1,2}(\.\d+)?", text):
                hours, minutes, seconds = text.split(":")
                declared.append(int(hours) * 3600 + int(minutes) * 60 + float(seconds))
        if declared:
            return max(declared)
        return container.duration / av.time_base if container.duration else None

    def _first_pts(self, container: av.container.InputContainer, stream: av.VideoStream) -> int | None:
        for frame in self._frames(container, stream, []):
            return frame.pts
        raise SourceError(f"{self.name}: no frame could be decoded")

    def _frames(
        self, container: av.container.InputContainer, stream: av.VideoStream, errors: list[str], start: float = 0.0
    ) -> Iterator[av.VideoFrame]:
        packets = self._packets(container, stream, errors)
        if start > 0 and stream.time_base is not None and self._origin is not None:
            packets = _needed(packets, self._origin + int(start / stream.time_base))
        return decoded(packets, errors)

    def _packets(
        self, container: av.container.InputContainer, stream: av.VideoStream, errors: list[str]
    ) -> Iterator[av.Packet]:
        """Yield packets with one clock, shifted forward after each restart."""
        base = stream.time_base or Fraction(0)
        step = round(1 / (self.rate or 25.0) / base) if base else 0
        playlist = container.format.name in _PLAYLISTS
        shift, due = 0, None
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:
                errors.append(reason_of(error))
                return
            if packet.dts is not None:
                ahead = 0.0 if due is None else float((packet.dts + shift - due) * base)
                if due is not None and (ahead < -_ANEW or (playlist and ahead > _AHEAD)):
                    shift = due - packet.dts
                due = packet.dts + shift + (packet.duration or step)
                packet.dts += shift
                if packet.pts is not None:
                    packet.pts += shift
            yield packet

    def _timed(
        self, container: av.container.InputContainer, stream: av.VideoStream, errors: list[str], start: float = 0.0
    ) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """Yield frames with their times and durations, complete from `start` on."""
        base = stream.time_base
        counted = 0.0
        for frame in self._frames(container, stream, errors, start):
            step = float(frame.duration * base) if frame.duration and base else 1 / (self.rate or 25.0)
            if frame.pts is None or self._origin is None or base is None:
                time = counted
            else:
                time = float((frame.pts - self._origin) * base)
            counted = time + step
            yield time, step, frame

    def read(self, start: float) -> Generator[Picture, None, None]:
        # if the clock may restart, a seek to a timestamp may reach another time
        if start > 0 and self._origin is not None and not self._restarts and self._lands_before(start):
            yield from self._read(start, seek=True)
        else:
            yield from self._read(start, seek=False)

    def _seek(self, container: av.container.InputContainer, stream: av.VideoStream, start: float) -> None:
        base = stream.time_base
        if self._origin is not None and base is not None:
            container.seek(self._origin + int(start / base), stream=stream, backward=True)

    def _lands_before(self, start: float) -> bool:
        """Return whether a seek to `start` reaches a frame at or before it; some containers cannot seek exactly."""
        with self._open() as container:
            stream = self._stream(container)
            try:
                self._seek(container, stream, start)
            except av.FFmpegError:
                return False
            return any(time <= start for time, _, _ in self._first(container, stream))

    def _first(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[tuple[float, float, av.VideoFrame]]:
        for timed in self._timed(container, stream, []):
            yield timed
            return

    def _read(self, start: float, *, seek: bool) -> Generator[Picture, None, None]:
        errors: list[str] = []
        last, end, corrupt = -1.0, 0.0, 0
        with self._open() as container:
            stream = self._stream(container)
            if seek:
                self._seek(container, stream, start)
            for time, step, frame in self._timed(container, stream, errors, 0.0 if seek else start):
                end = max(end, time + step)
                corrupt += frame.is_corrupt
                if time <= last:
                    self.dropped += 1
                    continue
                last = time
                yield Picture(time, partial(self._image, frame))
        if self.duration is not None and end < self.duration - max(0.5, 0.01 * self.duration):
            self.broken = True
            reason = errors[-1] if errors else "the file ends early"
            self.problems.append(f"decoding stopped at {end:.1f} s of {self.duration:.1f} s: {reason}")
        elif self.duration is not None and end > self.duration + 0.5:
            self.duration = end
        damaged = corrupt + len(errors)
        if damaged:
            self.problems.append(f"{damaged} damaged frame{'s' if damaged > 1 else ''}")
        if self.dropped:
            count = f"{self.dropped} frame{'s' if self.dropped > 1 else ''}"
            self.problems.append(f"{count} left out whose timestamps do not increase")


def _needed(packets: Iterator[av.Packet], start: int) -> Iterator[av.Packet]:
    """Yield packets from the last key frame at or before `start`, to decode nothing before it."""
    waiting: list[av.Packet] = []
    for packet in packets:
        if packet.is_keyframe and packet.pts is not None and packet.pts <= start:
            waiting.clear()
        waiting.append(packet)
        if packet.dts is None or packet.dts >= start:
            break
    yield from waiting
    yield from packets
