from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vmemory.eval import Features, hit_rate, localize, video_features
from vmemory.sources import SourceError


class Averages:
    """An encoder whose tokens are the mean colours of a 2 x 2 grid."""

    name, frame_size, batch_size = "averages", 8, 3

    def __init__(self) -> None:
        self.seen = 0

    def encode(self, frames: list[np.ndarray]) -> torch.Tensor:
        self.seen += len(frames)
        assert len(frames) <= self.batch_size
        cells = np.stack(frames).reshape(len(frames), 2, 4, 2, 4, 3).mean((2, 4))
        return torch.from_numpy(cells.astype(np.float32))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_video_is_encoded_once(clip: Path, tmp_path: Path) -> None:
    encoder = Averages()

    def features(path: Path, fps: float) -> Features:
        return video_features(path, encoder, fps, cache=tmp_path / "cache", progress=False)  # type: ignore[arg-type]

    first = features(clip, 2)
    assert encoder.seen == 6
    assert first.tokens.shape == (6, 2, 2, 3)
    assert first.tokens.dtype == torch.float16
    assert first.time.dtype == torch.float64
    assert first.time.tolist() == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    assert first.pooled().mean(1).tolist() == pytest.approx([8 * i for i in (0, 5, 10, 15, 20, 25)], abs=3)
    again = features(clip, 2)
    assert encoder.seen == 6
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.time, first.time)
    assert again.warning is None
    features(clip, 1)
    assert encoder.seen == 9
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes() + bytes(8))
    features(copy, 2)
    assert encoder.seen == 15
    encoder.name = "other"
    features(clip, 2)
    assert encoder.seen == 21


def test_missing_video(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.mp4: no such file"):
        video_features(tmp_path / "none.mp4", Averages(), cache=tmp_path)  # type: ignore[arg-type]


def test_localize_finds_the_nearest_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(50, 16, generator=generator) + 3
    time = torch.arange(50, dtype=torch.float64) * 2
    order = torch.randperm(50, generator=generator)
    found = localize(entries[order] + 0.01, entries, time)
    assert found.dtype == torch.float64
    assert torch.equal(found, time[order])
    twice = torch.cat([entries, entries])
    assert torch.equal(localize(entries, twice, torch.cat([time, time + 1000]), entries.mean(0)), time)


@pytest.mark.parametrize(
    ("queries", "entries", "time"), [((2, 4), (3, 5), 3), ((2, 4), (0, 4), 0), ((2, 4), (3, 4), 2), ((4,), (3, 4), 3)]
)
def test_localize_arguments(queries: tuple[int, ...], entries: tuple[int, ...], time: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        localize(torch.zeros(queries), torch.zeros(entries), torch.zeros(time))


def test_hit_rate() -> None:
    found = torch.tensor([1.0, 5.0, 9.0, 20.0], dtype=torch.float64)
    assert hit_rate(found, [1.0, 6.0, 7.0, 0.0], 1.0) == 0.5
    assert hit_rate(found, [1.0, 6.0, 7.0, 0.0], 2.0) == 0.75
    with pytest.raises(ValueError, match="found: expected"):
        hit_rate(found, [1.0], 1.0)
