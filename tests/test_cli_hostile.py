"""What files, questions and the network say is shown and never obeyed, and forged files are refused in a line."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vmemory.cli
from tests.colours import Colours, frames_of
from tests.commands import Run, check_page, clip, colours, expect_error, run
from vmemory.banks import BankFile, BankFileError
from vmemory.cli import ask
from vmemory.cli.common import make_encoder, question
from vmemory.cli.errors import UserError
from vmemory.cli.report import Report, write_report
from vmemory.cli.terminal import clean, one_line, open_page
from vmemory.search.presets import video_bank
from vmemory.search.video_search import VideoSearch

__all__ = ["clip", "colours", "run"]

ROOT = Path(__file__).parents[1]
# sets the title, clears the screen, answers back, turns the reading direction round; and rich's own markup
ESCAPES = "\x1b]0;mine\x07\x1b[2J\x9b6n\r\u202e"
MARKUP = "[/nope] [bold]loud[/] :smiley:"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A memory of nine frames, with thumbnails and an origin."""
    stream = VideoSearch(Colours(), video_bank("merging", 9, 4, entries=4), origin=torch.zeros(4))
    stream.push(frames_of([(200, 0, 0)] * 3 + [(0, 200, 0)] * 3 + [(0, 0, 200)] * 3))
    stream.facts = {"video": "clip.mp4", "fps": 1.0, "budget": "1MiB", "duration": 9.0}
    stream.save(tmp_path / "a.vmem")
    return tmp_path / "a.vmem"


def forge(path: Path, change: Callable[[BankFile], None]) -> Path:
    """Change what a file says, with a checksum that fits."""
    file = BankFile.read(path)
    change(file)
    file.write(path)
    return path


def test_cleaning() -> None:
    assert clean("a\x1b[2Jb\x9b") == "a\\x1b[2Jb\\x9b"
    assert clean("\u202eab\udcff\x00") == "\\u202eab\\udcff\\x00"
    assert clean("héllo 日本\n\tx") == "héllo 日本\n\tx"
    assert one_line("a\n\x07 b") == "a \\x07 b"


def test_only_one_file_prints() -> None:
    for path in Path(vmemory.cli.__file__).parent.glob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(named, ast.Name) and named.id == "print"), path
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                assert not names & {"Console", "Markup", "echo", "secho"}, path
        assert ".from_markup" not in path.read_text()
        assert "typer.echo" not in path.read_text()
        assert "sys.stdout.write" not in path.read_text()


def test_questions_and_facts_are_shown_and_not_obeyed(
    run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Colours, "text", lambda self, query: torch.tensor([1.0, 0.0, 0.0]))
    for hostile in (f"{ESCAPES}{MARKUP}<script>alert(1)</script>", "$\\frac$ and $5"):
        forge(saved, lambda file, text=hostile: file.notes["facts"].update(video=text, note=text, title=text))
        picture = tmp_path / f"p{hostile.replace('/', '')}.png"
        Image.new("RGB", (8, 8)).save(picture)
        code, out, err = run("ask", saved, f"q{hostile}", "--image", picture, "--out", tmp_path / "out")
        assert (code, err) == (0, "")
        assert not UNSAFE.search(out)
        assert clean(hostile) in out
        page = check_page(tmp_path / "out")
        assert not UNSAFE.search(page)
        assert "<script" not in page


@pytest.mark.parametrize("hostile", [ESCAPES, MARKUP])
def test_what_a_file_says_of_itself(
    run: Run, saved: Path, hostile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forge(saved, lambda file: file.notes.update(encoder=hostile))
    code, out, _ = run("inspect", saved, "--no-open")
    assert code == 0
    assert clean(hostile).split("\n")[0][:12] in out
    assert not UNSAFE.search(out)
    monkeypatch.setattr(ask, "make_encoder", make_encoder)
    monkeypatch.setattr("vmemory.cli.common.FrameEncoder", Colours)
    code, out, err = run("ask", saved, "red")
    assert (code, err.count("\n")) == (1, 1)
    assert not UNSAFE.search(out + err.rstrip("\n"))
    # a name that a file system takes
    code, _, err = run("ask", tmp_path / hostile.replace("/", ""), "red")
    assert (code, err.count("\n")) == (1, 1)
    assert not UNSAFE.search(err.rstrip("\n"))


def test_names_that_are_no_text(run: Run, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\x1b.mp4")
    expect_error(run("stream", tmp_path / name), re.escape("\\udcff\\x1b.mp4: no such file"))


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1e300,
    float("nan"),
    float("inf"),
    10**400,
    "x",
    "",
    "1MiB",
    [],
    {},
    [1, 2],
)


@pytest.mark.parametrize("name", ["budget", "fps", "duration", "video", "note"])
def test_forged_facts(run: Run, saved: Path, tmp_path: Path, name: str) -> None:
    original = saved.read_bytes()
    for value in VALUES:
        saved.write_bytes(original)
        forge(saved, lambda file, value=value: file.notes["facts"].update({name: value}))
        _refused_or_fine(run, saved, tmp_path, f"facts.{name}: expected|budget: expected")


@pytest.mark.parametrize("name", ["encoder", "facts", "latency", "trace"])
def test_forged_notes(run: Run, saved: Path, tmp_path: Path, name: str) -> None:
    original = saved.read_bytes()
    lists = [
        [9, 1, 1],
        [0, 0, 0, 0],
        [9, 1, 1, "x"],
        [-9, 1, 1, 1],
        [9, float("nan"), 1, 1],
        [9, 0],
        [9, "1"],
        [10**30, 1],
    ]
    for value in (*VALUES, *lists):
        saved.write_bytes(original)
        forge(saved, lambda file, value=value: file.notes.update({name: value}))
        _refused_or_fine(run, saved, tmp_path, f"{name}: expected|latency: expected|a memory without|written with")


TENSORS = {
    "trace": (torch.zeros(0, 3, dtype=torch.float64), torch.full((9, 3), float("nan"), dtype=torch.float64),
              torch.zeros(9, 2, dtype=torch.float64), torch.zeros(9, 3), torch.full((9, 3), 1e300, dtype=torch.float64),
              torch.zeros(3, dtype=torch.float64), -torch.arange(27, dtype=torch.float64).view(9, 3)),
    "origin": (torch.zeros(3), torch.full((4,), float("inf")), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1)),
    "thumbnails.offset": (torch.tensor([0, 10**9]), torch.tensor([-5, 3]), torch.zeros(0, dtype=torch.int64),
                          torch.zeros(5), torch.tensor([0, 1, 2, 3, 10**12])),
    "thumbnails.frame": (torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.tensor([5])),
    "thumbnails.time": (torch.full((4,), float("nan"), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)),
    "thumbnails.jpeg": (torch.zeros(5, dtype=torch.uint8), torch.zeros(5)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_forged_tensors(run: Run, saved: Path, tmp_path: Path, name: str) -> None:
    original = saved.read_bytes()
    for value in (None, *TENSORS[name]):
        saved.write_bytes(original)

        def change(file: BankFile, value: torch.Tensor | None = value) -> None:
            if value is None:
                del file.extra[name]
            else:
                file.extra[name] = value

        forge(saved, change)
        code = _refused_or_fine(run, saved, tmp_path, f"{name.partition('.')[0]}[a-z.]*: expected|clock: expected")
        # a memory may do without an origin, and without nothing else
        assert code == (0 if value is None and name == "origin" else 1)


def test_a_clock_that_is_none(run: Run, saved: Path, tmp_path: Path) -> None:
    for value in (float("inf"), 1e300):
        forge(saved, lambda file, value=value: file.state["clock"].fill_(value))
        assert _refused_or_fine(run, saved, tmp_path, r"(state\.)?clock: expected") == 1


def test_a_thumbnail_that_is_no_picture(run: Run, saved: Path, tmp_path: Path) -> None:
    forge(saved, lambda file: file.extra["thumbnails.jpeg"].zero_())
    code, _, err = run("inspect", saved, "--no-open", "--out", tmp_path / "out")
    assert code == 1
    assert re.fullmatch(r"vmemory: thumbnails: not a picture \(.*\)\n", err)


def _refused_or_fine(run: Run, saved: Path, tmp_path: Path, message: str) -> int:
    """No value ends in a traceback: it is named in a line, or a report is made of it. Returns the exit code."""
    refused = None
    try:
        VideoSearch.load(saved, lambda name: Colours())
    # whoever reads a file makes lines of these and of no others
    except BankFileError as error:
        refused = str(error)
    if refused is not None:
        assert re.fullmatch(rf"{saved}: ({message}).*", refused), refused
        return 1
    code, _, err = run("ask", saved, "red", "--out", tmp_path / "o")
    assert (code, err) == (0, "")
    return 0


def test_a_memory_that_saw_nothing(run: Run, tmp_path: Path) -> None:
    VideoSearch(Colours(), video_bank("merging", 9, 4, entries=4)).save(tmp_path / "a.vmem")
    code, _, err = run("inspect", tmp_path / "a.vmem", "--no-open")
    assert (code, err) == (1, "vmemory: no report: the memory has seen no frame\n")
    assert run("ask", tmp_path / "a.vmem", "red")[0] == 0


def test_a_single_frame_has_a_report(tmp_path: Path) -> None:
    stream = VideoSearch(Colours(), video_bank("merging", 9, 4, entries=4))
    stream.push(frames_of([(200, 0, 0)]))
    write_report(tmp_path, Report(stream))
    assert "0:00" in check_page(tmp_path)


@pytest.mark.parametrize("empty", ["", "  ", "\t\n", "\u200b", "\x07"])
def test_empty_questions_are_refused(run: Run, clip: Path, saved: Path, empty: str) -> None:
    expect_error(run("ask", saved, empty), "question: expected words, got")
    expect_error(run("stream", clip, "--ask", empty), "question: expected words, got")
    expect_error(run("chat", "--model", "none", "--video", clip, "--ask", empty), "question: expected words, got")


def test_an_empty_sentence_is_refused() -> None:
    stream = VideoSearch(Colours(), video_bank("merging", 9, 4, entries=4))
    with pytest.raises(ValueError, match="text: expected a sentence, got ' '"):
        stream.ask(" ")


def test_a_question_in_another_locale_is_the_question() -> None:
    assert question("ein Häschen 你好".encode().decode("ascii", "surrogateescape")) == "ein Häschen 你好"
    with pytest.raises(UserError, match="question: expected"):
        question("")


def test_no_arguments_ask_for_help(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "Usage: vmemory" in out
    assert "inspect" in out


def test_whatever_opens_a_page_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark, opener = tmp_path / "opened", tmp_path / "xdg-open"
    opener.write_text(f'#!/bin/sh\necho noise; echo noise >&2; echo "$1" > "{mark}"; exit 3\n')
    opener.chmod(opener.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start, started = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)))
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    open_page(tmp_path / "report.html")
    assert not started
    monkeypatch.setenv("DISPLAY", ":9")
    open_page(tmp_path / "report.html")
    started[0].wait(10)
    assert mark.read_text() == f"{tmp_path}/report.html\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["a folder", "a pipe"])
def test_what_is_no_picture_is_called_by_its_name(run: Run, saved: Path, tmp_path: Path, what: str) -> None:
    place = tmp_path / "p.png"
    place.mkdir() if what == "a folder" else os.mkfifo(place)
    expect_error(run("ask", saved, "--image", place), r"p\.png: a (directory|pipe), expected a picture")


def test_few_letters_are_enough(saved: Path) -> None:
    """A locale that knows ASCII alone, and a question and a name that are more."""
    code = (
        "import sys\nfrom tests.colours import Colours, WORDS\nWORDS['H\\u00e4schen'] = 0\n"
        "from vmemory.cli import ask, main\nask.make_encoder = lambda name=None: Colours()\nmain()\n"
    )
    other = saved.rename(saved.with_name("ü.vmem"))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "ask", str(other), "Häschen"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "H\\xe4schen" in done.stdout
    assert done.stdout.isascii()
