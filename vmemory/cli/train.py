"""`vmemory train`: models out of recipes: a YAML file's, or one of the package's own by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vmemory.cli.common import check_writable
from vmemory.cli.errors import Interrupted, user_input
from vmemory.cli.terminal import Terminal


class _Recipes(TyperGroup):
    """Commands by name; anything else is a recipe's file."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["recipe", *args])


train = typer.Typer(cls=_Recipes, help="Train a model: `vmemory train FILE.yaml`, or a recipe of the package by name.")


@train.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def recipe(context: typer.Context) -> None:
    """Train a video model, with or without a memory, by a YAML file; `--name value` behind it takes precedence."""
    import logging

    from vmemory.train import read_recipe
    from vmemory.train import train as run

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("vmemory").setLevel(logging.INFO)
    try:
        with user_input():
            run(read_recipe(context.args))
    except KeyboardInterrupt as error:
        raise Interrupted(str(error)) from None


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
