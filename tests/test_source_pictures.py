"""Picture files of any depth, that move, that are damaged or too large: alone and among others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmemory.sources import FrameSource, SourceError
from vmemory.sources.frames import as_frames
from vmemory.sources.pictures import holds_several

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


def _grey(source: FrameSource) -> np.ndarray:
    (frame,) = source
    assert frame.image.dtype == np.uint8
    assert np.array_equal(frame.image[..., 0], frame.image[..., 1])
    assert np.array_equal(frame.image[..., 0], frame.image[..., 2])
    return frame.image[..., 0]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("suffix", "values"),
    [
        ("png", (RAMP * 65535).astype(np.uint16)),
        ("tif", (RAMP * 65535).astype(np.uint16)),
        ("pgm", (RAMP * 65535).astype(np.uint16)),
        ("tif", RAMP.astype(np.float32)),
        # metres, degrees, 32-bit counts: from the least to the greatest
        ("tif", (RAMP * 700 - 200).astype(np.float32)),
        ("tif", (RAMP * 2_000_000_000).astype(np.int32)),
        ("tif", (RAMP * 6e38 - 3e38).astype(np.float32)),
    ],
)
def test_more_than_eight_bits_are_scaled(tmp_path: Path, suffix: str, values: np.ndarray, alone: bool) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    got = _grey(FrameSource(path if alone else tmp_path))
    assert np.abs(got.astype(float) - RAMP * 255).max() <= 0.5 + 255 / 65535


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    got = _grey(FrameSource(tmp_path))
    assert got[0, :4].tolist() == [0, 255, 0, round(float(RAMP[0, 3]) * 255)]
    Image.fromarray(np.full((8, 8), 7.0, np.float32)).save(tmp_path / "a.tif")
    assert _grey(FrameSource(tmp_path)).max() == 0


def _moving(path: Path, **options: object) -> Path:
    first, *rest = [Image.new("RGB", (32, 32), (50 * i, 0, 0)) for i in range(5)]
    first.save(path, save_all=True, append_images=rest, **options)
    return path


@pytest.mark.parametrize("suffix", ["webp", "gif", "png", "apng"])
def test_moving_pictures_move_at_their_own_speed(tmp_path: Path, suffix: str) -> None:
    kind = {"format": "PNG"} if suffix == "apng" else {}
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = _moving(tmp_path / f"b.{suffix}", duration=[500, 600, 700, 300, 100], **kind, **lossless)
    times = [0, 0.5, 1.1, 1.8, 2.1]
    for source in (FrameSource(path), FrameSource(tmp_path)):
        frames = list(source)
        assert [f.time for f in frames] == pytest.approx(times)
        assert [int(f.image[0, 0, 0]) for f in frames] == pytest.approx([0, 50, 100, 150, 200], abs=8)
        assert (source.duration, source.expected, source.warning) == (None, None, None)
    # what stands behind it waits, and what stands before it does not matter
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), (7, 7, 7)).save(tmp_path / "c.png")
    frames = list(FrameSource(tmp_path))
    assert [f.time for f in frames] == pytest.approx([0, *(1 + t for t in times), 3.2])
    assert frames[-1].image[0, 0].tolist() == [7, 7, 7]
    assert [f.time for f in FrameSource(tmp_path, fps=1)] == pytest.approx([0, 1, 2.1, 3.1])
    assert [f.time for f in FrameSource(tmp_path, start=3.0)] == pytest.approx([3.1, 3.2])


def test_a_picture_for_those_who_cannot_show_the_others_is_not_shown(tmp_path: Path) -> None:
    path = _moving(tmp_path / "a.png", duration=100, default_image=True)
    assert [int(f.image[0, 0, 0]) for f in FrameSource(path)] == [50, 100, 150, 200]


def test_pages_are_shown_like_files(tmp_path: Path) -> None:
    path = _moving(tmp_path / "a.tif")
    assert [f.time for f in FrameSource(path)] == [0, 1, 2, 3, 4]
    assert [f.time for f in FrameSource(tmp_path, fps=4)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_a_speed_of_nothing_is_quick(tmp_path: Path) -> None:
    assert [f.time for f in FrameSource(_moving(tmp_path / "a.gif", duration=0))] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 2,000 pixels is as large as one of 180 million is otherwise."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


@pytest.mark.usefixtures("limit")
def test_bad_pictures_among_good_ones_are_skipped_by_name(tmp_path: Path) -> None:
    good = Image.new("RGB", (8, 8), (200, 0, 0))
    good.save(tmp_path / "0.png")
    Image.new("1", (200, 100)).save(tmp_path / "1.png")
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    _moving(tmp_path / "3.gif", duration=100)
    data = (tmp_path / "3.gif").read_bytes()
    (tmp_path / "3.gif").write_bytes(data[: len(data) * 2 // 3])
    Image.new("LAB", (8, 8)).save(tmp_path / "4.tif")
    good.save(tmp_path / "5.png")
    source = FrameSource(tmp_path)
    frames = list(source)
    assert frames[0].time == 0
    assert frames[-1].image[0, 0].tolist() == [200, 0, 0]
    assert source.warning is not None
    for name in ("1.png", "2.jpg"):
        assert f"{name} (" in source.warning
    assert "20000 pixels" in source.warning
    assert "\n" not in source.warning
    assert source.dropped >= 2


@pytest.mark.usefixtures("limit")
def test_a_bad_picture_alone_says_why(tmp_path: Path) -> None:
    Image.new("1", (200, 100)).save(tmp_path / "a.png")
    with pytest.raises(SourceError, match=r"a\.png: no frame .*20000 pixels"):
        list(FrameSource(tmp_path / "a.png"))


@pytest.mark.usefixtures("limit")
def test_a_large_picture_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (50, 30), (9, 9, 9)).save(tmp_path / "a.png")
    with pytest.warns(Image.DecompressionBombWarning):
        assert next(iter(FrameSource(tmp_path))).image.shape == (30, 50, 3)


def test_previews_within_a_file_are_not_shown(tmp_path: Path) -> None:
    page, preview = Image.new("RGB", (32, 32)), Image.new("RGB", (8, 8))
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    page.save(tmp_path / "a.tif", save_all=True, append_images=[preview, page])
    page.save(tmp_path / "b.jpg", format="MPO", save_all=True, append_images=[preview])
    assert [f.image.shape[0] for f in FrameSource(tmp_path)] == [32, 32, 32]


def test_a_session_takes_deep_pictures_as_a_source_does(tmp_path: Path) -> None:
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    deep.save(tmp_path / "a.png")
    ((pixels, _),) = as_frames(deep)
    np.testing.assert_array_equal(pixels[0, 0].numpy(), _grey(FrameSource(tmp_path)))


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_a_damaged_file_holds_no_several_pictures(tmp_path: Path, suffix: str) -> None:
    whole = _moving(tmp_path / f"a.{suffix}").read_bytes()
    assert holds_several(tmp_path / f"a.{suffix}")
    draw, damaged = np.random.default_rng(0), tmp_path / f"b.{suffix}"
    for _ in range(200):
        data = bytearray(whole[: draw.integers(len(whole))] if draw.random() < 0.3 else whole)
        for place in draw.integers(max(min(len(data), 200), 1), size=5 if data else 0):
            data[place] = draw.integers(256)
        damaged.write_bytes(data)
        assert holds_several(damaged) in (True, False)


def test_errors_that_are_not_the_file_s_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _moving(tmp_path / "a.gif")

    def broken(path: Path) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        holds_several(path)
