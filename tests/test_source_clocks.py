"""Timestamps that start late or anew, films over http, and names that look like something else."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clips import served, write_clip_at
from vmemory.sources import FrameSource, LiveSource, SourceError
from vmemory.sources.live import open_video
from vmemory.sources.places import place_of, shown

RATE = 24


def _times(source: FrameSource) -> list[float]:
    return [frame.time for frame in source]


def _numbers(source: FrameSource) -> list[int]:
    """Which frame of a clip of up to 60 each frame is."""
    return [round(float(frame.image.mean()) / 4) for frame in source]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings of two seconds, the second with B-frames: one behind the other, and as an HLS playlist."""
    folder = tmp_path_factory.mktemp("pieces")
    a = write_clip_at(folder / "a.ts", list(range(48)), codec_options={"bf": "0", "g": "12"})
    b = write_clip_at(folder / "b.ts", list(range(48)), codec_options={"bf": "2", "g": "12"})
    (folder / "ab.ts").write_bytes(a.read_bytes() + b.read_bytes())
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:2", "#EXTINF:2,", "a.ts", "#EXT-X-DISCONTINUITY", "#EXTINF:2,", "b.ts"]
    (folder / "ab.m3u8").write_text("\n".join([*lines, "#EXT-X-ENDLIST", ""]))
    write_clip_at(folder / "far.ts", [90_000 + i for i in range(48)], codec_options={"bf": "0"})
    (folder / "far.m3u8").write_text("\n".join([*lines[:-1], "far.ts", "#EXT-X-ENDLIST", ""]))
    (folder / "live.m3u8").write_text("\n".join([*lines, ""]))
    write_clip_at(folder / "film.mp4", list(range(60)), options={"movflags": "faststart"})
    return folder


@pytest.mark.parametrize("name", ["ab.ts", "ab.m3u8", "far.m3u8"])
def test_clocks_that_start_anew_go_on(pieces: Path, name: str) -> None:
    source = FrameSource(pieces / name)
    frames = list(source)
    # the second piece begins when the first one ends, give or take the frame by which B-frames delay it
    np.testing.assert_allclose([f.time for f in frames], np.arange(96) / RATE, rtol=0, atol=2.1 / RATE)
    assert np.all(np.diff([f.time for f in frames]) > 0.5 / RATE)
    assert [round(float(f.image.mean()) / 4) for f in frames] == [*range(48), *range(48)]
    assert (source.dropped, source.truncated, source.warning) == (0, False, None)
    # a file of pieces declares the length of one of them
    assert source.duration == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("name", ["ab.ts", "ab.m3u8"])
@pytest.mark.parametrize("start", [0.7, 1.9, 2.0, 3.3])
def test_a_start_behind_the_seam_means_the_time_that_goes_on(pieces: Path, name: str, start: float) -> None:
    whole = [frame for frame in FrameSource(pieces / name) if frame.time >= start]
    part = list(FrameSource(pieces / name, start=start))
    assert [f.time for f in part] == [f.time for f in whole]
    for got, want in zip(part, whole, strict=True):
        np.testing.assert_array_equal(got.image, want.image)


def test_a_single_step_back_is_no_new_start(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "a.ts", list(range(48)), codec_options={"bf": "0"})
    bent = tmp_path / "bent.ts"
    with av.open(str(path)) as source, av.open(str(bent), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            # the 20th picture is told the time of the 19th, to a tick
            if packet.pts == packet.dts and round((packet.pts - stream.start_time) * stream.time_base * RATE) == 20:
                packet.pts = packet.dts = packet.dts - round(Fraction(1, RATE) / stream.time_base) + 1
            packet.stream = copy
            target.mux(packet)
    assert len(_times(FrameSource(bent))) == 48
    times = _times(FrameSource(bent))
    assert times[-1] == pytest.approx(47 / RATE, abs=1e-3)


@pytest.mark.parametrize("suffix", ["mkv", "webm", "nut", "mp4", "mov", "ts", "flv"])
def test_a_late_start_is_no_damage(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = write_clip_at(tmp_path / f"late.{suffix}", [5 * RATE + i for i in range(RATE)], codec=codec)
    source = FrameSource(path)
    assert len(_times(source)) == RATE
    assert (source.truncated, source.warning) == (False, None)
    assert source.duration == pytest.approx(1.0, abs=0.1)
    assert source.expected == pytest.approx(RATE, abs=2)
    assert _times(FrameSource(path, fps=4)) == pytest.approx([0, 0.25, 0.5, 0.75], abs=1 / RATE)


def test_a_film_over_http_is_a_film(pieces: Path) -> None:
    with served(pieces) as address:
        for name in ("film.mp4", "ab.ts", "ab.m3u8"):
            film = open_video(f"{address}/{name}", 4.0)
            disk = FrameSource(pieces / name, 4.0)
            assert isinstance(film, FrameSource)
            assert _times(film) == _times(disk)
        assert _numbers(FrameSource(f"{address}/film.mp4", start=1.0, stop=1.2)) == list(range(24, 29))
        assert FrameSource(f"{address}/ab.m3u8").endless is False
        with pytest.raises(SourceError, match=r"none\.mp4: not a readable video file"):
            open_video(f"{address}/none.mp4", 4.0)


def test_what_a_server_never_finishes_is_live(pieces: Path) -> None:
    with served(pieces) as address:
        assert FrameSource(f"{address}/live.m3u8").endless
        source = open_video(f"{address}/live.m3u8", 4.0, 16)
        assert isinstance(source, LiveSource)
        source.close()


@pytest.mark.parametrize(
    "name", ["10:30:00.mp4", "cam[1-2].mp4", "50%d.mp4", "a b?#.mp4", "concat:x.mp4", "-.mp4", "ü日.mp4"]
)
def test_names_are_names(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes((pieces / "film.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(list(FrameSource(name))) == 60
    assert len(list(open_video(name, 1000.0))) == 60
    assert len(list(FrameSource(tmp_path / name, start=1.0))) == 36


def test_names_that_are_no_text(pieces: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4"))
    path.write_bytes((pieces / "film.mp4").read_bytes())
    assert len(list(FrameSource(path))) == 60


def test_places() -> None:
    assert place_of("film.mp4") == Path("film.mp4")
    assert place_of(0) == Path("/dev/video0")
    assert place_of("10:30.mp4") == Path("10:30.mp4")
    # a path makes one slash of two
    assert place_of(Path("http://host/a.mp4")) == "http://host/a.mp4"
    assert place_of("rtsp://me:word@host:554/cam?token=1") == "rtsp://me:word@host:554/cam?token=1"
    assert place_of("file:///tmp/a%20b.mp4") == Path("/tmp/a b.mp4")
    assert shown("rtsp://me:word@host:554/cam?token=1") == "rtsp://host:554/cam"
    assert shown("udp://@239.0.0.1:1234") == "udp://239.0.0.1:1234"


def test_what_is_no_file_is_called_by_its_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(SourceError, match=r"pipe\.mp4: a pipe, expected a file, a directory or an address"):
        FrameSource(tmp_path / "pipe.mp4")
    with pytest.raises(SourceError, match="/dev/null: a device"):
        FrameSource("/dev/null")


def test_a_duration_that_is_no_duration(tmp_path: Path) -> None:
    path = write_clip_at(tmp_path / "a.mkv", list(range(24)))
    data = path.read_bytes()
    at = data.index(b"00:00:01.0")
    path.write_bytes(data[:at] + b"aa:bb:cc.d" + data[at + 10 :])
    source = FrameSource(path)
    assert len(_times(source)) == 24
    assert source.duration == pytest.approx(1.0, abs=0.1)
