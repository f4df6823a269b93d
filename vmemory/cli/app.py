"""The command line program: it imports the command that is called, and prints errors as lines on stderr."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from vmemory.cli.errors import Interrupted, UserError
from vmemory.cli.terminal import error_line

# each is a function, or a Typer of several, with its module's name in this folder, imported on demand, because most
# need torch
COMMANDS = {
    "stream": "Watch a video, and answer from what the memory still holds.",
    "ask": "Ask a saved memory.",
    "inspect": "Show what a saved memory holds; of a watched video, open the report.",
    "chat": "Let a model watch, and ask it: type a question at any moment, an empty line or Ctrl-D to end.",
    "demo": "Watch Big Buck Bunny at one frame a second, ask about it, and measure how memories find moments again.",
    "eval": "Ask a model about streams through many memories, each stream encoded once, and compare their answers.",
    "localize": "Look up frames of a trailer in memories that watched the ten-minute film, and count which are found.",
    "memory": "Look into a personal memory graph, and change it.",
    "train": "Train a model: `vmemory train FILE.yaml`, or a recipe of the package by name.",
    "tune": "Find the best settings of a memory of a given size, for answers about the world or for moments of a film.",
    "world": "Make videos of a world that nobody filmed, and questions whose answers are known.",
    "info": "Tell what was built, what loaded, and the reason for anything missing.",
}


def run(arguments: list[str] | None = None) -> int:
    """Run a command line, by default this program's, and return its exit code; an empty one asks for help."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = _app(arguments)(arguments, prog_name="vmemory", standalone_mode=False) or 0
        # only Ctrl-C without anything to save exits with this code
        return fail("interrupted", code) if code == Interrupted.exit_code else code
    except typer.TyperException as error:
        return fail(error.format_message(), error.exit_code)
    except UserError as error:
        return fail(error, error.exit_code)
    except ModuleNotFoundError as error:
        return fail(f'{error.name} is not installed: pip install "vmemory[stream]"')
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}")
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, _told()):
            raise
        return fail(error)


def _app(arguments: list[str]) -> typer.Typer:
    """Return the program with the called command; other commands have only their name and summary."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Watch video through a bounded memory, and ask the memory about it.",
    )
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = getattr(import_module(f"vmemory.cli.{name}"), name) if name == asked else _not_asked
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=summary)
        else:
            app.command(name, short_help=summary, help=None if name == asked else summary)(command)
    return app


def _not_asked() -> None:
    raise NotImplementedError("a command is imported before it runs")


def _told() -> tuple[type[Exception], ...]:
    """Return the error classes about files, packages and downloads, whose message is for the user."""
    from vmemory.banks import BankFileError
    from vmemory.data import FetchError
    from vmemory.encoders import AssetError
    from vmemory.graph import GraphFileError
    from vmemory.sources import SourceError

    return BankFileError, FetchError, AssetError, GraphFileError, SourceError


def fail(message: object, code: int = 1) -> int:
    error_line(message)
    return code
