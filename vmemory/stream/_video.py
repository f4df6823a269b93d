"""Video files through PyAV: presentation timestamps, scaling while converting, damage reported."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vmemory.stream._readers import Picture, SourceError, scaled_size


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class VideoReader:
    """The first real video stream of a file.

    Times are presentation timestamps in seconds, rebased so that the first one is 0; streams without
    timestamps count the frame durations. A frame whose time does not increase is dropped and counted.
    """

    def __init__(self, path: Path, size: int | tuple[int, int] | None) -> None:
        self.name = str(path)
        self.broken = False
        self.problems: list[str] = []
        self._size = size
        self._reformatter = VideoReformatter()
        with self._open() as container:
            stream = self._stream(container)
            if stream.codec_context is None:
                raise SourceError(f"{self.name}: no decoder for its video stream")
            rate = stream.average_rate or stream.guessed_rate
            self.rate: float | None = float(rate) if rate else None
            self.tick = float(stream.time_base or 0) + 1e-9
            self.duration: float | None = self._declared_duration(container, stream)
            self._origin = self._first_pts(container, stream)

    def _open(self) -> av.container.InputContainer:
        try:
            container = av.open(self.name)
        except (av.FFmpegError, ValueError) as error:
            raise SourceError(f"{self.name}: not a readable video file ({_reason(error)})") from error
        # ffmpeg would render any text file as a video of a terminal
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
            if key.upper().startswith("DURATION") and text.count(":") == 2:
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
        self, container: av.container.InputContainer, stream: av.VideoStream, errors: list[str]
    ) -> Iterator[av.VideoFrame]:
        # packet by packet: one damaged packet must not cost the frames behind it
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:
                errors.append(_reason(error))
                return
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                errors.append(_reason(error))
                continue
            yield from frames

    def _timed(
        self, container: av.container.InputContainer, stream: av.VideoStream, errors: list[str]
    ) -> Iterator[tuple[float, float, av.VideoFrame]]:
        base = stream.time_base
        counted = 0.0
        for frame in self._frames(container, stream, errors):
            step = float(frame.duration * base) if frame.duration and base else 1 / (self.rate or 25.0)
            if frame.pts is None or self._origin is None or base is None:
                time = counted
            else:
                time = float((frame.pts - self._origin) * base)
            counted = time + step
            yield time, step, frame

    def _image(self, frame: av.VideoFrame) -> np.ndarray:
        quarter_turns = round(frame.rotation / 90) % 4
        size = self._size
        if isinstance(size, tuple) and quarter_turns % 2:
            size = (size[1], size[0])
        height, width = scaled_size(frame.height, frame.width, size)
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        image = rgb.to_ndarray()
        return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image

    def read(self, start: float) -> Generator[Picture, None, None]:
        if start > 0 and self._origin is not None and self._lands_before(start):
            yield from self._read(start)
        else:
            yield from self._read(0.0)

    def _seek(self, container: av.container.InputContainer, stream: av.VideoStream, start: float) -> None:
        base = stream.time_base
        if self._origin is not None and base is not None:
            container.seek(self._origin + int(start / base), stream=stream, backward=True)

    def _lands_before(self, start: float) -> bool:
        """Whether a seek to `start` reaches a frame at or before it; some containers cannot, or miss."""
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

    def _read(self, start: float) -> Generator[Picture, None, None]:
        errors: list[str] = []
        last, end, backwards, corrupt = -1.0, 0.0, 0, 0
        with self._open() as container:
            stream = self._stream(container)
            if start > 0:
                self._seek(container, stream, start)
            for time, step, frame in self._timed(container, stream, errors):
                end = max(end, time + step)
                corrupt += frame.is_corrupt
                if time <= last:
                    backwards += 1
                    continue
                last = time
                yield Picture(time, lambda frame=frame: self._image(frame))  # type: ignore[misc]
        if self.duration is not None and end < self.duration - max(0.5, 0.01 * self.duration):
            self.broken = True
            reason = errors[-1] if errors else "the file ends early"
            self.problems.append(f"decoding stopped at {end:.1f} s of {self.duration:.1f} s: {reason}")
        damaged = corrupt + len(errors)
        if damaged:
            self.problems.append(f"{damaged} damaged frame{'s' if damaged > 1 else ''}")
        if backwards:
            self.problems.append(f"{backwards} frames dropped whose timestamps do not increase")
