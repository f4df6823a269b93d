"""`vmemory train`: models out of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmemory.cli.common import check_writable
from vmemory.cli.errors import user_input
from vmemory.cli.terminal import Terminal

train = typer.Typer(help="Train a model by one of the package's recipes.")


@train.callback()
def _commands() -> None:
    """Keep `worldlm` a command of its own, though it is the only one."""


@train.command()
def worldlm(
    out: Annotated[Path, typer.Option(help="Folder for the model, its tokenizer, its metrics and its card.")],
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0, max=2000)] = 0,
    scale: Annotated[float, typer.Option(help="Share of the steps, to try whether it runs.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 1,
) -> None:
    """Train a small video language model on the world, from nothing."""
    import torch

    from vmemory.train.worldlm import train_worldlm

    check_writable(out, folder=True)
    torch.set_num_threads(threads)
    terminal = Terminal()
    with user_input():
        train_worldlm(out, seed=seed, scale=scale, tell=terminal.line)
    terminal.line(f"model: {out}")
