"""`vmemory tune`: find the best settings of a memory of a given size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vmemory.banks import format_bytes
from vmemory.cli.common import check_writable, make_encoder
from vmemory.cli.errors import UserError, user_input
from vmemory.cli.eval import split
from vmemory.cli.models import WORLDLM, video_model
from vmemory.cli.terminal import Terminal, plain_table
from vmemory.eval.chart import draw_tuning
from vmemory.eval.objectives import LocalisationObjective, Objective, WorldObjective
from vmemory.eval.streams import world_stream
from vmemory.eval.tune import SEARCHED, Tuned

WORLD, LOCALISATION = "world", "localisation"


def tune(
    objective: Annotated[str, typer.Argument(metavar="world|localisation", help="Answers, or moments found.")],
    model: Annotated[str, typer.Option(help="For world: worldlm, a folder with a model, or its id.")] = WORLDLM,
    budgets: Annotated[str, typer.Option(help="Sizes, with commas: tokens (96) or bytes (64KiB).")] = "96",
    policies: Annotated[str, typer.Option(help="To search, with commas.")] = ",".join(SEARCHED),
    trials: Annotated[int, typer.Option(help="For each size, those of earlier runs included.", min=1)] = 40,
    out: Annotated[
        Path, typer.Option(help="Folder for trials, pictures and best_*.json; a second run goes on.")
    ] = Path("tuning"),
    streams: Annotated[int, typer.Option(help="Worlds of the validation split.", min=1)] = 8,
    seconds: Annotated[int, typer.Option(help="Length of each.", min=4)] = 240,
    seed: Annotated[int, typer.Option(help="Of the search.", min=0)] = 0,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of a frame at most.", min=1)] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …  [default: a GPU if there is one]")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch.", min=1)] = None,
) -> None:
    """Find the best settings of a memory of a given size, for answers about the world or for moments of a film."""
    import torch

    from vmemory.eval.tune import tune as search

    check_writable(out, folder=True)
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise UserError('optuna is not installed: pip install "vmemory[stream,tune]"') from None
    if threads is not None:
        torch.set_num_threads(threads)
    with user_input():
        made = _objective(objective, model, streams, seconds, frame_tokens, device)
        shown = Terminal(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
            tasks = {budget: bar.add_task(f"trials at {budget}", total=trials) for budget in split(budgets)}
            found = search(
                made, out, split(budgets), trials=trials, policies=split(policies), seed=seed,
                done=lambda budget, count: bar.update(tasks[budget], completed=count),
            )  # fmt: skip
    draw_tuning(found, out / "tuning.png")
    terminal = Terminal()
    print_tuned(terminal, found)
    terminal.line(f"best settings and picture: {out}")


def _objective(name: str, model: str, streams: int, seconds: int, frame_tokens: int, device: str | None) -> Objective:
    if name == WORLD:
        loaded, processor = video_model(model, device)
        asked = [world_stream(seed, seconds, split="validation") for seed in range(streams)]
        return WorldObjective(loaded, processor, asked, frame_tokens=frame_tokens)
    if name != LOCALISATION:
        raise UserError(f"objective: expected {WORLD} or {LOCALISATION}, got {name!r}")
    from vmemory.data import fetch_film, fetch_trailer
    from vmemory.eval.features import video_features
    from vmemory.eval.trailer import trailer_queries

    encoder = make_encoder()
    film, trailer = (video_features(path, encoder, 2.0) for path in (fetch_film(), fetch_trailer()))
    return LocalisationObjective(film, trailer_queries(trailer))


def print_tuned(terminal: Terminal, found: Sequence[Tuned]) -> None:
    """Print the best memory of each size."""
    table = plain_table("size", "score", "trials", "bytes", "settings", right=("score", "trials", "bytes"))
    for one in found:
        best = max((trial for trial in one.trials if trial.score is not None), key=lambda trial: trial.score or 0.0)
        settings = {
            name.removeprefix("memory_"): value for name, value in best.config.items() if name != "enable_memory_bank"
        }
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        table.add_row(one.budget, f"{one.score:.3f}", str(len(one.trials)), format_bytes(best.nbytes), told)
    terminal.print(table)
