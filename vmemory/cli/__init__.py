"""The `vmemory` command."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from io import TextIOWrapper

# modules that the command needs, which the extra `stream` installs
_NEEDED = ("typer", "rich", "av", "PIL", "matplotlib", "jinja2")


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0 = done, 1 = the input cannot be used, 2 = wrong usage, 130 = interrupted."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f'vmemory: the command needs {", ".join(missing)}: pip install "vmemory[stream]"')
    from vmemory.cli.app import run

    for stream in (sys.stdout, sys.stderr):
        # characters that the locale cannot encode are escaped
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        # warnings of libraries are for programmers
        warnings.simplefilter("ignore")
    sys.exit(run(arguments))
