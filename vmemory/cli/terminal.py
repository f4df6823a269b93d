"""Print to the terminal; text from files, questions, models and the network is cleaned first."""

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

# control characters except tab and line break, bidirectional controls, and surrogates
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: object) -> str:
    """Replace control characters in text by their escapes, so that they have no effect."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """Clean text and replace every gap by one space."""
    return " ".join(clean(text).split())


class Terminal(Console):
    """A console that prints every string as plain text: no markup, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: object) -> Text:
        """Clean a string; rich calls this for every string in lines, tables and bars."""
        return super().render_str(clean(text), **options)  # type: ignore[arg-type]

    def line(self, text: object = "", style: str = "") -> None:
        """Print text without wrapping."""
        self.print(str(text), style=style, soft_wrap=True)

    def piece(self, text: str) -> None:
        """Print text without a line break."""
        self.print(text, end="", soft_wrap=True)


def error_line(text: object) -> None:
    """Print a line on stderr, after the program's name."""
    print(f"vmemory: {one_line(text)}", file=sys.stderr)


def plain_table(*columns: str, right: tuple[str, ...] = (), header: bool = True) -> Table:
    """Make a table without lines."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=header)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def open_page(page: Path) -> None:
    """Open a page in the browser if there is a desktop; the opener's output is not shown."""
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if desktop and shutil.which(opener):
        quiet = subprocess.DEVNULL
        # the browser continues after this program ends
        subprocess.Popen([opener, str(page)], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
