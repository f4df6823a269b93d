"""`vmemory eval`: ask a model about streams through many memories, and compare them."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vmemory
from vmemory._files import replacing
from vmemory.cli.common import check_writable
from vmemory.cli.errors import UserError, user_input
from vmemory.cli.models import WORLDLM, video_model
from vmemory.cli.terminal import Terminal, error_line, plain_table
from vmemory.data.online.reading import Skipped
from vmemory.eval.cells import cells_of
from vmemory.eval.chart import draw_accuracy
from vmemory.eval.evaluate import evaluate
from vmemory.eval.files import FORMATS, file_streams
from vmemory.eval.scores import AGES, Row, Score, score_rows
from vmemory.eval.streams import Asked, world_stream

WORLD = "world"
_POLICIES = "recent,uniform,merging,hierarchical,episodic,reservoir,default"
# worlds of the training split that guesses are learned from
_KNOWN = 100


def eval(  # the command's name
    source: Annotated[str, typer.Argument(metavar="world|FILE", help="The drawn world, or a file with questions.")],
    model: Annotated[str, typer.Option(help="worldlm, a folder with a model, or its id on a hub.")] = WORLDLM,
    policies: Annotated[str, typer.Option(help="Names or .json files of settings, with commas.")] = _POLICIES,
    budgets: Annotated[str, typer.Option(help="Sizes, with commas: tokens (96), shares (25%), bytes (64KiB).")] = "25%",
    out: Annotated[Path, typer.Option(help="Folder for answers, table and picture; a second run goes on.")] = Path(
        "evaluation"
    ),
    streams: Annotated[int, typer.Option(help="Number of worlds.", min=1)] = 40,
    seconds: Annotated[int, typer.Option(help="Length of each world.", min=4)] = 240,
    seed: Annotated[int, typer.Option(help="Seed of the first world of the test split.", min=0)] = 0,
    videos: Annotated[Path | None, typer.Option(help="Folder of a file's videos.")] = None,
    form: Annotated[str, typer.Option("--format", help=f"Of a file: {', '.join(FORMATS)}.")] = FORMATS[0],
    fps: Annotated[float, typer.Option(help="Frames of a video to look at, a second.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 16,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of a frame at most.", min=1)] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …  [default: a GPU if there is one]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of torch.", min=1)] = None,
) -> None:
    """Ask a model about streams through many memories, each stream encoded once, and compare their answers."""
    import torch

    check_writable(out, folder=True)
    if threads is not None:
        torch.set_num_threads(threads)
    terminal = Terminal()
    with user_input():
        cells = cells_of(split(policies), split(budgets))
        if source == WORLD:
            asked = [world_stream(seed + i, seconds) for i in range(streams)]
            skipped: list[Skipped] = []
        else:
            if not Path(source).is_file():
                raise UserError(f"{source}: expected 'world' or a file, got neither")
            asked, skipped = file_streams(source, videos, form=form, fps=fps)
        loaded, processor = video_model(model, device, dtype)
        for line in skipped:
            error_line(f"left out: {line.name}: {line.reason}")
        columns = (TextColumn("streams"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = Terminal(stderr=True)
        with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
            task = bar.add_task("streams", total=len(asked))
            records = evaluate(
                loaded, processor, asked, cells, out / "answers.jsonl", name=model, frame_tokens=frame_tokens,
                max_new_tokens=tokens, done=lambda count: bar.update(task, completed=count), tell=error_line,
            )  # fmt: skip
        known = world_questions(seconds) if source == WORLD else None
        rows = score_rows(records, asked, [cell.name for cell in cells], known)
    print_rows(terminal, rows)
    facts = {
        "model": model, "source": source, "streams": len(asked), "left_out": [list(line) for line in skipped],
        "date": date.today().isoformat(), "machine": machine(), "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    with replacing(out / "scores.json") as path:
        path.write_text(json.dumps(facts, indent=1))
    draw_accuracy(rows, out / "accuracy.png", f"{model} on {source}, {len(asked)} streams")
    terminal.line(f"answers, scores and picture: {out}")


def split(text: str) -> list[str]:
    """Split a list at its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def world_questions(seconds: int) -> list[Asked]:
    """Return questions about worlds of the training split, for guesses."""
    return [question for seed in range(_KNOWN) for question in world_stream(seed, seconds, split="train").questions]


def machine() -> str:
    """Name the processor and the versions that results depend on."""
    import torch

    place = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {place}, torch {torch.__version__}, vmemory {vmemory.__version__}"


def print_rows(terminal: Terminal, rows: Sequence[Row]) -> None:
    """Print accuracies, ± half of their 95 % intervals: now and past, then the past by age."""
    whole = any("past" in row.right or "now" in row.right for row in rows)
    groups = ("now", "past") if whole else ("all",)
    last = "past, by oracle" if whole else "near"
    table = plain_table("memory", "tokens", *groups, last, right=("tokens",))
    for row in rows:
        extra = row.oracle.get("past") if whole else row.near.get("all")
        table.add_row(row.name, _tokens(row), *(_share(row.right.get(group)) for group in groups), _share(extra))
    terminal.print(table)
    if not any(age in row.right for row in rows for age in AGES):
        return
    terminal.line()
    terminal.line("past, by the seconds since the answer was last to be seen")
    table = plain_table("memory", *AGES, "oracle, over 120 s")
    for row in rows:
        table.add_row(row.name, *(_share(row.right.get(age)) for age in AGES), _share(row.oracle.get("over 120 s")))
    terminal.print(table)


def _tokens(row: Row) -> str:
    return "" if row.tokens is None else f"{row.tokens:.0f}"


def _share(score: Score | None) -> str:
    return "" if score is None else f"{score.mean:.3f} ± {(score.high - score.low) / 2:.2f}"
