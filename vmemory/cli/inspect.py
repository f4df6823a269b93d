"""`vmemory inspect`: show the content of a `.vmem` file, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vmemory.banks import BankFile, format_bytes, load
from vmemory.cli.common import check_writable, make_encoder, timecode
from vmemory.cli.report import Report, write_report
from vmemory.cli.terminal import Terminal, open_page, plain_table
from vmemory.search.video_search import VideoSearch


def inspect(
    memory: Annotated[Path, typer.Argument(help="A .vmem file.")],
    out: Annotated[Path | None, typer.Option(help="Directory for the report.  [default: beside the file]")] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the report.")] = True,
) -> None:
    """Show what a saved memory holds; of a watched video, open the report."""
    bank, file = load(memory)
    terminal = Terminal()
    terminal.print(facts(bank, file))
    if "encoder" not in file.notes:
        return
    folder = out or memory.with_name(f"{memory.stem}-report")
    check_writable(folder, folder=True)
    page = write_report(folder, Report(VideoSearch.load(memory, make_encoder)))
    terminal.line(f"report: {page}")
    if show:
        open_page(page)


def facts(bank: object, file: BankFile) -> Table:
    """Return a table of kind, size and contents of a memory, one line each."""
    counts, nbytes = bank.counts(), bank.nbytes  # type: ignore[attr-defined]  # a Bank or a DualMemory
    tokens = bank.read()  # type: ignore[attr-defined]
    settings = ", ".join(f"{name} {value}" for name, value in file.config.items() if value is not None)
    times = tokens.time[tokens.time.isfinite()]
    span = f"{timecode(float(times.min()))} to {timecode(float(times.max()))}" if len(times) else "unknown"
    table = plain_table("name", "value", header=False)
    table.columns[0].style = "dim"
    for name, value in (
        ("memory", file.policy), ("settings", settings), ("bytes", format_bytes(nbytes)),
        ("frames", ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("tokens", str(tokens.tokens.shape[0])), ("times", span),
        ("written by", "a video session" if "session" in file.notes else file.notes.get("encoder", "a memory alone")),
    ):  # fmt: skip
        table.add_row(name, str(value))
    return table
