"""Trailer localisation as tables, in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vmemory.banks import format_bytes
from vmemory.cli.curve import label
from vmemory.eval.features import Features
from vmemory.eval.trailer import (
    BUDGETS,
    ENTRIES,
    LONGEST_SPAN,
    TOLERANCE,
    Score,
    by_bytes,
    by_entries,
    by_storage,
    trailer_queries,
)


class Scores(NamedTuple):
    """Groups of scores at equal entries, after the unbounded memory, at equal bytes, and with tokens in few bits."""

    by_entries: list[list[Score]]
    by_bytes: list[list[Score]]
    budgets: Sequence[str]
    by_storage: list[list[Score]]


def measure(film: Features, trailer: Features, *, few_bits: bool = False) -> Scores:
    """Every memory at every size, and with `few_bits` also with tokens in 8 and 4 bits."""
    queries = trailer_queries(trailer)
    stored = by_storage(film, queries, ENTRIES) if few_bits else []
    return Scores(by_entries(film, queries, ENTRIES), by_bytes(film, queries, BUDGETS), BUDGETS, stored)


def table_of(caption: str, group: Sequence[Score]) -> dict[str, Any]:
    """One group as text, as the page's template takes it."""
    bounded = [score.hits for score in group if score.policy != "unbounded"]
    most = max(bounded, default=None)
    return {
        "caption": caption,
        "asked": group[0].asked,
        "rows": [
            {
                "name": label(score),
                "entries": score.held,
                "nbytes": format_bytes(score.nbytes),
                "hits": score.hits,
                "share": f"{80 * score.hits / score.asked:.1f}",
                "exact": score.exact,
                "error": f"{score.error:.2f} s" if score.error < 10 else f"{score.error:.0f} s",
                "push": f"{score.push:.0f} µs",
                "best": score.policy != "unbounded" and score.hits == most,
                "ceiling": score.policy == "unbounded",
            }
            for score in group
        ],
    }


def print_scores(console: Console, scores: Scores) -> None:
    """One table for equal entries, one for equal bytes, and one for few bits where they were measured."""
    asked = scores.by_entries[0][0].asked
    kinds = [("equal entries", scores.by_entries), ("equal bytes", scores.by_bytes)]
    kinds += [("equal entries, tokens in few bits", scores.by_storage)] if scores.by_storage else []
    for title, groups in kinds:
        console.print(f"{asked} trailer frames looked up in the film, {title}", style="bold", highlight=False)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("memory", "held", "bytes", "found", "exact", "error", "push"):
            table.add_column(name, justify="left" if name == "memory" else "right", no_wrap=True)
        for group in groups:
            for row in table_of("", group)["rows"]:
                cells = (str(row[key]) for key in ("name", "entries", "nbytes", "hits", "exact", "error", "push"))
                table.add_row(*cells, style="bold" if row["best"] else "")
            table.add_row()
        console.print(table)
    console.print(
        f"found: within {TOLERANCE:g} s, or inside a merged span of at most {LONGEST_SPAN:g} s; "
        "exact: the span's length counts as error; error: median; push: median of one frame",
        style="dim",
        highlight=False,
    )
