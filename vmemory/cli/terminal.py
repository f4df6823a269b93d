"""The terminal: the one place that prints, and that cleans what came from files, questions, models and the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

# control characters but tab and line break; what turns the direction of reading round; halves of characters
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: object) -> str:
    """Text that a terminal or a page only shows: a character that would do more is written as its escape, `\\x1b`."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """Clean text with one space for every gap."""
    return " ".join(clean(text).split())


class Terminal(Console):
    """A console that takes every string as plain text: no markup, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: object) -> Text:  # whatever rich asks for
        """Rich calls this for every string, in lines, tables and bars alike."""
        return super().render_str(clean(text), **options)  # type: ignore[arg-type]

    def line(self, text: object = "", style: str = "") -> None:
        """Print text as it is, whatever the width."""
        self.print(str(text), style=style, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Print text that goes on in the next piece."""
        self.print(text, end="", soft_wrap=True)


def error_line(text: object) -> None:
    """Print a line on stderr, after the program's name."""
    print(f"vmemory: {one_line(text)}", file=sys.stderr)


def plain_table(*columns: str, right: tuple[str, ...] = (), header: bool = True) -> Table:
    """A table without lines."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=header)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def open_page(page: Path) -> None:
    """Show a page in the browser where there is a desktop to show it on; whatever the opener says is not shown."""
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if desktop and shutil.which(opener):
        quiet = subprocess.DEVNULL
        # it lives on when this program ends
        subprocess.Popen([opener, str(page)], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
