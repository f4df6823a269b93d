"""`vmemory ask`: questions to a memory that was saved, without the video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vmemory.cli.common import answer_all, check_writable, make_encoder, print_answers, print_note, read_image
from vmemory.cli.errors import UserError
from vmemory.cli.report import Report, write_report
from vmemory.stream.memory_stream import MemoryStream


def ask(
    memory: Annotated[Path, typer.Argument(help="A .vmem file that `vmemory stream --save` wrote.")],
    questions: Annotated[list[str] | None, typer.Argument(help="Sentences to look for.")] = None,
    image: Annotated[list[Path], typer.Option(help="A picture to look for; may be repeated.")] = [],  # noqa: B006
    k: Annotated[int, typer.Option("-k", help="Answers a question.", min=1, max=100)] = 5,
    out: Annotated[Path | None, typer.Option(help="Directory for report.html and timeline.png.")] = None,
) -> None:
    """Ask a saved memory."""
    if not questions and not image and out is None:
        raise UserError('nothing to do: give a question, as in vmemory ask film.vmem "a rabbit", --image or --out')
    if out is not None:
        check_writable(out, folder=True)
    pictures = [(path.name, read_image(path)) for path in image]
    stream = MemoryStream.load(memory, make_encoder)
    answered = answer_all(stream, questions or [], pictures, k)
    console = Console()
    print_note(console, stream)
    print_answers(console, answered)
    if out is not None:
        page = write_report(out, Report(stream, answered))
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
