"""`vmemory ask`: ask a saved memory, without the video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmemory.cli.common import (
    answer_all,
    check_writable,
    make_encoder,
    print_answers,
    print_note,
    question,
    read_image,
)
from vmemory.cli.errors import UserError
from vmemory.cli.report import Report, write_report
from vmemory.cli.terminal import Terminal
from vmemory.search.video_search import VideoSearch


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
    texts = [question(text) for text in questions or []]
    if out is not None:
        check_writable(out, folder=True)
    pictures = [(path.name, read_image(path)) for path in image]
    stream = VideoSearch.load(memory, make_encoder)
    answered = answer_all(stream, texts, pictures, k)
    terminal = Terminal()
    print_note(terminal, stream)
    print_answers(terminal, answered)
    if out is not None:
        page = write_report(out, Report(stream, answered))
        terminal.line(f"report: {page}")
