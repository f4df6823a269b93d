"""What the tests of the commands share: a clip, a runner with an encoder of colours, and checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.colours import BLUE, GREEN, RED, Colours, write_clip
from vmemory.cli import app, ask, demo, inspect, localize, stream

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds each of red, green and blue."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", [RED] * 24 + [GREEN] * 24 + [BLUE] * 24)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ask, demo, inspect, localize, stream):
        monkeypatch.setattr(module, "make_encoder", lambda name=None: Colours())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], colours: None) -> Run:
    def run_command(*arguments: object) -> tuple[int, str, str]:
        code = app.run([str(argument) for argument in arguments])
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return run_command


def expect_error(result: tuple[int, str, str], message: str, code: int = 1) -> None:
    got, out, err = result
    assert got == code
    assert err.count("\n") == 1
    assert err.startswith("vmemory: ")
    assert re.search(message, err)
    assert out == ""


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]


def check_page(folder: Path) -> str:
    page = (folder / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert parser.links
    assert all(link.startswith("data:image/") for link in parser.links)
    assert not re.search(r"url\(|@import|<script", page)
    return page
