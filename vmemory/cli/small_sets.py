"""Tables of the two small sets: a walk in photos, and a clip of six shots."""

from __future__ import annotations

from rich.table import Table

from vmemory.banks import format_bytes
from vmemory.cli.common import timecode
from vmemory.cli.curve import label
from vmemory.cli.terminal import Terminal
from vmemory.encoders import FrameEncoder
from vmemory.eval import bikes, walk


def print_walk(terminal: Terminal, encoder: FrameEncoder) -> None:
    """Who finds the held-out photos of the walk, and which are missed."""
    features, queries, names = walk.walk(encoder)
    unbounded, groups = walk.by_bytes(features, queries, walk.BUDGETS)
    shown = len(features.time)
    for caption, group in zip(("all photos", *walk.BUDGETS), ([unbounded], *groups), strict=True):
        table = _table("memory", "held", "bytes", "found", "missed")
        for score in group:
            missed = ", ".join(names[i].removesuffix(".png") for i in score.missed)
            bytes_held = format_bytes(score.nbytes)
            table.add_row(label(score.setup), f"{score.held}", bytes_held, f"{score.hits} of {score.asked}", missed)
        terminal.print(f"{len(names)} held-out photos looked up among {shown}, {caption}", style="bold")
        terminal.print(table)
        terminal.line()
    rule = (
        f"found: within {walk.TOLERANCE:g} places, or in a merged span of at most {walk.LONGEST_SPAN:g} that holds it"
    )
    terminal.print(rule, style="dim")


def print_bikes(terminal: Terminal, encoder: FrameEncoder) -> None:
    """Who answers with the right shot of the clip, and what is answered wrongly."""
    features, queries = bikes.bikes(encoder)
    unbounded, groups = bikes.by_bytes(features, queries, encoder, bikes.BUDGETS)
    frames, pictures, sentences = len(features.time), len(queries.pooled), len(queries.text)
    for caption, group in zip(("all frames", *bikes.BUDGETS), ([unbounded], *groups), strict=True):
        table = _table("memory", "held", "bytes", "pictures", "sentences", "missed")
        for score in group:
            shots = ", ".join(f"{shot + 1}" for shot in score.lost)
            missed = "; ".join(
                [f"shot {shots}"] * bool(shots) + [f"{text} ({timecode(at)})" for text, at in score.wrong]
            )
            right = (f"{score.pictures} of {pictures}", f"{score.sentences} of {sentences}")
            table.add_row(label(score.setup), f"{score.held}", format_bytes(score.nbytes), *right, missed)
        terminal.print(f"shots of {frames} frames looked up, {caption}", style="bold")
        terminal.print(table)
        terminal.line()
    rule = "right: the answer lies wholly in a shot that shows it; in brackets where the wrong answer lies"
    terminal.print(rule, style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        side = "left" if name in ("memory", "missed") else "right"
        table.add_column(name, justify=side, no_wrap=name != "missed")  # type: ignore[arg-type]
    return table
