"""`vmemory world`: videos of a world that nobody filmed, and questions whose answers are known."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vmemory.cli.common import check_writable
from vmemory.cli.errors import user_input
from vmemory.cli.terminal import Terminal
from vmemory.data.world import KINDS, World, ask_stream, blind_accuracy, chance, make_worlds

world = typer.Typer(help="Make videos of a world that nobody filmed, and questions whose answers are known.")


@world.callback()
def _commands() -> None:
    """Name the group, whose commands follow."""


@world.command()
def make(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where videos/ and the JSON files go.")],
    items: Annotated[int, typer.Option(help="Number of worlds.")] = 16,
    seed: Annotated[int, typer.Option(help="The first world's seed; the next have the numbers behind it.")] = 0,
    seconds: Annotated[int, typer.Option(help="Length of each.")] = 60,
    split: Annotated[str, typer.Option(help="train, validation or test; they share no world and no layout.")] = "train",
    questions: Annotated[int, typer.Option(help="Questions about each world, at most.")] = 12,
    fps: Annotated[int, typer.Option(help="Frames a second.")] = 1,
    pace: Annotated[float, typer.Option(help="2 makes everything stay twice as long.")] = 1.0,
) -> None:
    """Write worlds as videos, and questions about them in VideoChat-Online's format."""
    check_writable(folder, folder=True)
    terminal = Terminal()
    with Terminal(stderr=True).status("worlds are drawn") as status, user_input():
        meta = make_worlds(
            folder, items, seed=seed, seconds=seconds, split=split, questions=questions, fps=fps, pace=pace,
            done=lambda count: status.update(f"worlds are drawn: {count} of {items}"),
        )  # fmt: skip
    terminal.line(f"{items} world{'s' if items > 1 else ''} of {seconds} s: {meta}")


@world.command()
def blind(
    seconds: Annotated[int, typer.Option(help="Length of each world.")] = 60,
    known: Annotated[int, typer.Option(help="Worlds of the training split whose answers are known.", min=1)] = 250,
    asked: Annotated[int, typer.Option(help="Worlds of the test split that are asked about.", min=1)] = 120,
) -> None:
    """Measure how many questions are answered right by someone who sees no picture, kind by kind."""
    with user_input():
        given, wanted = (
            [
                question
                for number in range(count)
                for question in ask_stream(
                    World(number, seconds, split=split), np.random.RandomState([number, 5]), count=16
                )
            ]
            for split, count in (("train", known), ("test", asked))
        )
        right = blind_accuracy(given, wanted)
    terminal = Terminal()
    counts = Counter(question.kind for question in wanted)
    terminal.line(f"{'kind':18} chance   blind   questions")
    for kind in KINDS:
        if kind in right:
            terminal.line(f"{kind:18} {chance(kind, seconds):6.3f}  {right[kind]:6.3f}  {counts[kind]:10}")
