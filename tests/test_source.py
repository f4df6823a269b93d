from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.clips import write_clip_at
from vmemory.sources import FrameSource, SourceError

RATE = 24


def _cut(path: Path, name: str, share: float) -> Path:
    data = path.read_bytes()
    short = path.with_name(name)
    short.write_bytes(data[: int(len(data) * share)])
    return short


def _times(source: FrameSource) -> list[float]:
    return [frame.time for frame in source]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_every_frame_at_its_presentation_time(tmp_path: Path, suffix: str) -> None:
    path = write_clip_at(tmp_path / f"a.{suffix}", list(range(48)))
    source = FrameSource(path)
    frames = list(source)
    assert [frame.index for frame in frames] == list(range(48))
    assert frames[0].time == 0
    # the clock of mkv counts milliseconds, and rounding moves first and last pts
    np.testing.assert_allclose([f.time for f in frames], np.arange(48) / RATE, rtol=0, atol=1e-3)
    assert frames[0].image.shape == (48, 64, 3)
    assert frames[0].image.dtype == np.uint8
    brightness = [float(frame.image.mean()) for frame in frames]
    np.testing.assert_allclose(brightness, 4 * np.arange(48), rtol=0, atol=3)
    assert source.expected == source.emitted == 48
    assert source.duration == pytest.approx(2.0, abs=0.05)
    assert not source.truncated
    assert source.warning is None


def test_first_timestamp_is_the_origin(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "late.mkv", [240 + i for i in range(10)])
    assert _times(FrameSource(path))[:2] == pytest.approx([0, 1 / RATE], abs=1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [1, 2, 5, 7.5, RATE, 100])
def test_sampling_takes_the_first_frame_at_or_after_each_multiple(tmp_path: Path, suffix: str, fps: float) -> None:
    path = write_clip_at(tmp_path / f"a.{suffix}", list(range(72)))
    source = FrameSource(path, fps=fps)
    got = [round(time * RATE) for time in _times(source)]
    share = Fraction(fps)
    multiples = [-(-k * RATE // share) for k in range(int(3 * share) + 1)]
    expected = sorted({int(x) for x in multiples if x < 72})
    assert got == expected
    assert source.expected == len(expected)


def test_variable_frame_rate(tmp_path: Path) -> None:
    ticks = [0, 1, 2, 30, 31, 100, 240, 241, 250]
    path = write_clip_at(tmp_path / "v.mkv", ticks, base=Fraction(1, 100))
    assert _times(FrameSource(path)) == pytest.approx([t / 100 for t in ticks])
    assert _times(FrameSource(path, fps=2)) == pytest.approx([0, 1.0, 2.4, 2.5])


@pytest.mark.parametrize("fps", [None, 4])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_start_and_stop(tmp_path: Path, suffix: str, fps: float | None) -> None:
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = write_clip_at(tmp_path / f"a.{suffix}", list(range(96)), codec=codec)
    whole = list(FrameSource(path, fps=fps))
    part = FrameSource(path, fps=fps, start=1.2, stop=2.6)
    frames = list(part)
    assert [f.time for f in frames] == [f.time for f in whole if 1.2 <= f.time < 2.6]
    assert [f.index for f in frames] == list(range(len(frames)))
    for got, want in zip(frames, [f for f in whole if 1.2 <= f.time < 2.6], strict=True):
        np.testing.assert_array_equal(got.image, want.image)
    assert part.expected == pytest.approx(len(frames), abs=1)
    assert not part.truncated


def test_stream_without_timestamps_counts_durations(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "a.h264", list(range(48)))
    times = _times(FrameSource(path))
    assert len(times) == 48
    assert times[0] == 0
    # a raw stream says nothing of its rate: ffmpeg assumes 25 or reads the encoder's hint
    steps = np.diff(times)
    assert np.all(steps > 0.03)
    assert np.all(steps < 0.05)


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("avi", "mpeg4")])
def test_truncated_file_keeps_what_decodes(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_clip_at(tmp_path / f"a.{suffix}", list(range(96)), codec=codec, noise=True)
    source = FrameSource(_cut(path, f"cut.{suffix}", 0.5))
    frames = list(source)
    assert 20 < len(frames) < 60
    assert source.truncated
    assert source.warning is not None
    assert f"cut.{suffix}: decoding stopped at" in source.warning
    assert "of 4.0 s" in source.warning
    assert "\n" not in source.warning
    # an iteration that ends before the damage has nothing to report
    list(FrameSource(source.name, stop=0.5))
    clipped = FrameSource(source.name, stop=0.5)
    list(clipped)
    assert not clipped.truncated


def test_truncated_mp4(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "a.mp4", list(range(96)), noise=True)
    with pytest.raises(SourceError, match=r"cut\.mp4: not a readable video file"):
        FrameSource(_cut(path, "cut.mp4", 0.6))
    # with the index in front, the same cut can be read up to where it ends
    fast = write_clip_at(tmp_path / "b.mp4", list(range(96)), noise=True, options={"movflags": "faststart"})
    source = FrameSource(_cut(fast, "cutfast.mp4", 0.6))
    frames = list(source)
    assert 20 < len(frames) < 80
    assert source.truncated
    assert "decoding stopped at" in str(source.warning)


def test_damaged_middle_is_reported_and_passed(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "a.ts", list(range(96)), codec="mpeg4", noise=True)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    source = FrameSource(path)
    times = _times(source)
    assert times[-1] == pytest.approx(95 / RATE, abs=2 / RATE)
    assert "damaged frame" in str(source.warning)
    assert not source.truncated


@pytest.mark.parametrize(("height", "width"), [(50, 62), (98, 130), (48, 64)])
@pytest.mark.parametrize(
    ("size", "expect"),
    [(None, None), (32, "short"), ((31, 45), (31, 45)), ((97, 33), (97, 33)), (1, "short")],
)
def test_sizes(tmp_path: Path, height: int, width: int, size: int | tuple[int, int] | None, expect: object) -> None:
    path = write_clip_at(tmp_path / "a.mkv", [0, 1, 2], height=height, width=width)
    frame = next(iter(FrameSource(path, size=size)))
    if expect == "short":
        assert isinstance(size, int)
        expect = (size, max(1, round(width * size / height)))
    assert frame.image.shape == (*(expect or (height, width)), 3)


def test_odd_picture(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "odd.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 37, 23, "bgr0"
        image = np.random.default_rng(0).integers(0, 255, (23, 37, 3), dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    (frame,) = FrameSource(tmp_path / "odd.mkv")
    np.testing.assert_array_equal(frame.image, image)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("x", "y"), [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_display_matrices_turn_and_mirror(tmp_path: Path, across: bool, x: int, y: int) -> None:
    height, width = 32, 48
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = (220, 0, 0), (0, 220, 0)
    picture[height // 2 :, : width // 2] = (0, 0, 220)
    path = tmp_path / "m.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    a, b, c, d = (0, y, x, 0) if across else (x, 0, 0, y)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    # pixel by pixel: what lies at (i, j) from the middle comes to (a i + c j, b i + d j)
    tall, wide = (width, height) if across else (height, width)
    expected = np.zeros((tall, wide, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            i, j = column - (width - 1) / 2, row - (height - 1) / 2
            expected[int(b * i + d * j + (tall - 1) / 2), int(a * i + c * j + (wide - 1) / 2)] = picture[row, column]
    (frame,) = FrameSource(path)
    assert frame.image.shape == expected.shape
    # stored without loss, but in 8 bits of another colour space
    assert np.abs(frame.image.astype(int) - expected).max() <= 3
    assert next(iter(FrameSource(path, size=(40, 20)))).image.shape == (40, 20, 3)


def test_image_directory(tmp_path: Path) -> None:
    for i in (10, 9, 1, 2):
        Image.new("RGB", (30, 20), (i, 0, 0)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    source = FrameSource(tmp_path)
    frames = list(source)
    assert [f.image[0, 0, 0] for f in frames] == [1, 2, 9, 10]
    assert [f.time for f in frames] == [0, 1, 2, 3]
    assert source.expected == 4
    assert _times(FrameSource(tmp_path, fps=4)) == [0, 0.25, 0.5, 0.75]
    assert _times(FrameSource(tmp_path, start=1.5)) == [2, 3]
    assert next(iter(FrameSource(tmp_path, size=10))).image.shape == (10, 15, 3)


def test_broken_image_leaves_its_gap(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    source = FrameSource(tmp_path)
    assert _times(source) == [0, 2]
    assert "1.png" in str(source.warning)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays(kind: str) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (20, 6, 8, 3), dtype=np.uint8)
    given = clip if kind == "numpy" else torch.from_numpy(clip)
    source = FrameSource(given, source_fps=10)
    frames = list(source)
    np.testing.assert_array_equal(np.stack([f.image for f in frames]), clip)
    assert [f.time for f in frames] == [i / 10 for i in range(20)]
    assert source.duration == 2.0
    sampled = FrameSource(given, fps=4, source_fps=10)
    assert _times(sampled) == [0, 0.3, 0.5, 0.8, 1.0, 1.3, 1.5, 1.8]
    assert sampled.expected == 8
    assert _times(FrameSource(given, source_fps=10, start=1.0, stop=1.3)) == [1.0, 1.1, 1.2]
    assert next(iter(FrameSource(given, size=(3, 4)))).image.shape == (3, 4, 3)


def test_iterating_twice_gives_the_same(tmp_path: Path) -> None:
    source = FrameSource(write_clip_at(tmp_path / "a.mp4", list(range(24))), fps=8)
    first = list(source)
    second = list(source)
    assert [f.time for f in first] == [f.time for f in second]
    assert source.emitted == len(second) == 8


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.mp4: no such file"):
        FrameSource(tmp_path / "none.mp4")
    for name, content in [("a.mp4", b"hello" * 900), ("b.mp4", b""), ("c.txt", b"some text\n" * 50)]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=name) as caught:
            FrameSource(tmp_path / name)
        assert "\n" not in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SourceError, match="empty: no images"):
        FrameSource(empty)
    with pytest.raises(SourceError, match="no frames"):
        FrameSource(np.zeros((0, 4, 4, 3), np.uint8))
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError, match=r"sound\.wav: no video stream"):
        FrameSource(tmp_path / "sound.wav")


def test_a_window_without_frames_raises(tmp_path: Path) -> None:
    source = FrameSource(write_clip_at(tmp_path / "a.mp4", list(range(24))), start=5.0)
    with pytest.raises(SourceError, match=r"a\.mp4: no frame from 5 s .*lasts 1\.0 s"):
        list(source)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"fps": 0}, ValueError),
        ({"fps": float("nan")}, ValueError),
        ({"source_fps": -1}, ValueError),
        ({"start": -1}, ValueError),
        ({"start": 2, "stop": 2}, ValueError),
        ({"size": 0}, ValueError),
        ({"size": (3, 4, 5)}, ValueError),
        ({"size": 2.5}, TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception]) -> None:
    clip = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(error, match=r"^(fps|source_fps|start|stop|size): expected"):
        FrameSource(clip, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), ValueError),
        (np.zeros((2, 4, 4), np.uint8), ValueError),
        (np.zeros((2, 3, 4, 4), np.uint8), ValueError),
        ([1, 2], TypeError),
    ],
)
def test_bad_arrays(source: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^source: expected"):
        FrameSource(source)  # type: ignore[arg-type]
