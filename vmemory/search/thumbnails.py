"""Keep small pictures of the frames in a memory's entries."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Thumbnails:
    """At most one JPEG for each entry of a memory: the frame within its span that is nearest to its time.

    Args:
        width: Width in pixels; the aspect ratio is kept.
        quality: JPEG quality, 1 to 95.
    """

    def __init__(self, width: int = 160, quality: int = 80) -> None:
        self.width, self.quality = width, quality
        # frame number -> seconds, JPEG; numbers ascend
        self._kept: dict[int, tuple[float, bytes]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(len(jpeg) for _, jpeg in self._kept.values())

    def update(
        self,
        numbers: Sequence[int],
        times: Sequence[float],
        images: Sequence[np.ndarray],
        first: np.ndarray,
        last: np.ndarray,
        time: np.ndarray,
    ) -> None:
        """Keep only those of the old pictures and the new frames that entries need.

        Args:
            numbers, times, images: New frames: their number in the stream, seconds, uint8 RGB `[H, W, 3]`.
            first, last, time: `[n]` span of frame numbers and seconds of each entry, in stream order.
        """
        new = {number: (t, image) for number, t, image in zip(numbers, times, images, strict=True)}
        seconds = {number: t for number, (t, _) in self._kept.items()} | {n: t for n, (t, _) in new.items()}
        frames = np.array(sorted(seconds), dtype=np.int64)
        chosen = nearest(frames, np.array([seconds[n] for n in frames.tolist()]), first, last, time)
        wanted = frames[np.unique(chosen[chosen >= 0])].tolist()
        self._kept = {
            number: self._kept[number]
            if number in self._kept
            else (new[number][0], jpeg(new[number][1], self.width, self.quality))
            for number in wanted
        }

    def of(self, first: int, last: int) -> bytes | None:
        """Return the JPEG within a span of frame numbers, or None."""
        numbers = list(self._kept)
        place = bisect_left(numbers, first)
        return self._kept[numbers[place]][1] if place < len(numbers) and numbers[place] <= last else None

    def tensors(self) -> dict[str, Tensor]:
        """Return all data: `frame [n]` int64, `time [n]` float64, `offset [n + 1]` int64 into `jpeg [bytes]`."""
        pictures = [jpeg for _, jpeg in self._kept.values()]
        offset = np.concatenate([[0], np.cumsum([len(p) for p in pictures], dtype=np.int64)]).astype(np.int64)
        return {
            "frame": torch.tensor(list(self._kept), dtype=torch.int64),
            "time": torch.tensor([t for t, _ in self._kept.values()], dtype=torch.float64),
            "offset": torch.from_numpy(offset),
            "jpeg": torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8)
            if pictures
            else torch.zeros(0, dtype=torch.uint8),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `tensors`."""
        data, offset = tensors["jpeg"].numpy().tobytes(), tensors["offset"].tolist()
        self._kept = {
            number: (t, data[begin:end])
            for number, t, begin, end in zip(
                tensors["frame"].tolist(), tensors["time"].tolist(), offset[:-1], offset[1:], strict=True
            )
        }


def nearest(
    frames: np.ndarray, seconds: np.ndarray, first: np.ndarray, last: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """Return for each span `[first, last]` of frame numbers the index of its frame nearest to `time`, −1 if none.

    Args:
        frames, seconds: `[m]` frame numbers and their times, ascending.
        first, last, time: `[n]`.
    """
    begin, end = np.searchsorted(frames, first, "left"), np.searchsorted(frames, last, "right")
    if len(frames) == 0:
        return np.full(len(first), -1, dtype=np.int64)
    after = np.clip(np.searchsorted(seconds, time), begin, np.maximum(end - 1, begin)).clip(max=len(frames) - 1)
    before = np.maximum(after - 1, begin).clip(max=len(frames) - 1)
    best = np.where(np.abs(seconds[before] - time) <= np.abs(seconds[after] - time), before, after)
    return np.where(end > begin, best, -1)


def jpeg(image: np.ndarray, width: int, quality: int) -> bytes:
    """Encode a uint8 RGB picture as a JPEG of `width` pixels; smaller pictures keep their size."""
    from PIL import Image

    picture = Image.fromarray(image)
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
