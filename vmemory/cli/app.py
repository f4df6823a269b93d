"""The commands together, and the one place where errors become lines on stderr."""

from __future__ import annotations

import sys

import typer

from vmemory.banks import BankFileError
from vmemory.cli.ask import ask
from vmemory.cli.chat import chat
from vmemory.cli.demo import demo
from vmemory.cli.errors import Interrupted, UserError
from vmemory.cli.info import info
from vmemory.cli.inspect import inspect
from vmemory.cli.localize import localize
from vmemory.cli.stream import stream
from vmemory.cli.terminal import error_line
from vmemory.data import FetchError
from vmemory.encoders import AssetError
from vmemory.sources import SourceError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Watch video through a bounded memory, and ask the memory about it.",
)
for command in (stream, ask, inspect, chat, demo, localize, info):
    app.command()(command)


def run(arguments: list[str] | None = None) -> int:
    """Run a command line, by default this program's, and return its exit code; an empty one asks for help."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, prog_name="vmemory", standalone_mode=False) or 0
        # nothing in here exits with this code by itself: Ctrl-C where there was nothing to keep
        return fail("interrupted", code) if code == Interrupted.exit_code else code
    except typer.TyperException as error:
        return fail(error.format_message(), error.exit_code)
    except UserError as error:
        return fail(error, error.exit_code)
    except (SourceError, BankFileError, AssetError, FetchError) as error:
        return fail(error)
    except ModuleNotFoundError as error:
        return fail(f'{error.name} is not installed: pip install "vmemory[stream]"')
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")


def fail(message: object, code: int = 1) -> int:
    error_line(message)
    return code
