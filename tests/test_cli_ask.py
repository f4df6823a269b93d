from __future__ import annotations

from pathlib import Path

import pytest

from tests.colours import Colours
from tests.commands import Run, check_page, clip, colours, expect_error, run
from vmemory.cli import ask, inspect
from vmemory.cli.common import make_encoder
from vmemory.search.presets import video_bank

__all__ = ["clip", "colours", "run"]


def test_a_saved_memory_gives_the_same_answers(run: Run, clip: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "clip.vmem", tmp_path / "out"
    _, first, _ = run("stream", clip, "--entries", 9, "--ask", "blue", "--ask", "red", "--save", saved)
    code, again, err = run("ask", saved, "blue", "red", "--out", out)
    assert (code, err) == (0, "")
    # the tables, without the summary before them and the report's path behind
    assert again.split("report:")[0].rstrip() == first[first.index("blue") :].rstrip()
    assert "What " in check_page(out)


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
        (old, "version '9', this vmemory reads version 1"),
        (altered, "the file was altered"),
        (bare, "a memory without a video stream"),
    ):
        expect_error(run("ask", path, "red"), rf"{path.name}: .*{message}")
    expect_error(run("ask", saved), "nothing to do: give a question")
    assert run("ask", saved, "red")[0] == 0


def test_a_memory_of_another_encoder(clip: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "clip.vmem"
    run("stream", clip, "--entries", 9, "--save", saved)
    monkeypatch.setattr("vmemory.cli.common.FrameEncoder", Colours)
    monkeypatch.setattr(Colours, "name", "shapes")
    monkeypatch.setattr(ask, "make_encoder", make_encoder)
    expect_error(run("ask", saved, "red"), "written with encoder 'colours', this vmemory has 'shapes'")


def test_inspect_opens_the_report_of_what_was_watched(
    run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(inspect, "open_page", opened.append)
    saved, bare = tmp_path / "clip.vmem", tmp_path / "bare.vmem"
    run("stream", clip, "--entries", 9, "--save", saved)
    code, told, err = run("inspect", saved)
    assert (code, err) == (0, "")
    assert "colours" in told
    check_page(tmp_path / "clip-report")
    assert opened == [tmp_path / "clip-report" / "report.html"]
    assert run("inspect", saved, "--no-open", "--out", tmp_path / "there")[0] == 0
    check_page(tmp_path / "there")
    video_bank("recent", 9, 4, entries=2).save(bare)
    code, told, _ = run("inspect", bare)
    assert code == 0
    assert "a memory alone" in told
    assert len(opened) == 1
    expect_error(run("inspect", tmp_path / "none.vmem"), "no such file")
