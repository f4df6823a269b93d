"""Tables of trailer localisation for the terminal and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from vmemory.banks import format_bytes
from vmemory.cli.curve import label
from vmemory.cli.terminal import Terminal, plain_table
from vmemory.eval.features import Features
from vmemory.eval.trailer import (
    BUDGETS,
    DTYPES,
    DUAL_ENTRIES,
    ENTRIES,
    LONGEST_SPAN,
    TOLERANCE,
    Score,
    by_bytes,
    by_entries,
    of_dual,
    trailer_queries,
)


class Scores(NamedTuple):
    """The unbounded memory; groups of scores by caption at equal entries; and at equal bytes, by budget."""

    unbounded: Score
    by_entries: dict[str, list[Score]]
    by_bytes: dict[str, list[Score]]


def measure(film: Features, trailer: Features, *, everything: bool = False) -> Scores:
    """Score every memory at equal bytes in 16 bits.

    With `everything` also in 8 and 4 bits, at equal numbers of entries, and the dual memory, which takes minutes.
    """
    queries = trailer_queries(trailer)
    sizes = ENTRIES if everything else ()
    (unbounded,), *groups = by_entries(film, queries, sizes)
    entries = {f"{n} entries each": group for n, group in zip(sizes, groups, strict=True)}
    if everything:
        entries[f"{DUAL_ENTRIES} entries, not calibrated"] = of_dual(film, queries, DUAL_ENTRIES)
    stored = by_bytes(film, queries, BUDGETS, DTYPES if everything else DTYPES[:1])
    captions = [f"{budget.replace('MiB', ' MiB')} each" for budget in BUDGETS]
    return Scores(unbounded, entries, dict(zip(captions, stored, strict=True)))


def table_of(caption: str, group: Sequence[Score]) -> dict[str, Any]:
    """Return one group as text for the page's template."""
    bounded = [score.hits for score in group if score.setup.policy != "unbounded"]
    most = max(bounded, default=None)
    return {
        "caption": caption,
        "asked": group[0].asked,
        "rows": [
            {
                "name": label(score.setup),
                "entries": score.held,
                "nbytes": format_bytes(score.nbytes),
                "hits": score.hits,
                "share": f"{80 * score.hits / score.asked:.1f}",
                "exact": score.exact,
                "detail": f"{score.detail:.2f}",
                "error": f"{score.error:.2f} s" if score.error < 10 else f"{score.error:.0f} s",
                "push": f"{score.push:,.0f} µs",
                "best": score.setup.policy != "unbounded" and score.hits == most,
                "ceiling": score.setup.policy == "unbounded",
            }
            for score in group
        ],
    }


def print_best(terminal: Terminal, scores: Scores) -> None:
    """Print one table: the best form of each policy at the smallest budget, and a memory of every frame."""
    caption, group = next(iter(scores.by_bytes.items()))
    best: dict[str, Score] = {}
    for score in group:
        if score.setup.policy not in best or score.hits > best[score.setup.policy].hits:
            best[score.setup.policy] = score
    rows = [*sorted(best.values(), key=lambda score: -score.hits), scores.unbounded]
    asked = f"{scores.unbounded.asked} frames of the trailer looked up in memories of the film, {caption}"
    terminal.line(asked, style="bold")
    table = plain_table("memory", "held", "bytes", "found", "error", right=("held", "bytes", "found", "error"))
    for row in table_of("", rows)["rows"]:
        table.add_row(*(str(row[key]) for key in ("name", "entries", "nbytes", "hits", "error")))
    terminal.print(table)
    explained = f"found: within {TOLERANCE:g} s, or in a merged span that holds it; error: median; more in the report"
    terminal.line(explained, style="dim")
    terminal.line()


_COLUMNS = ("memory", "held", "bytes", "found", "exact", "detail", "error", "push")
_KEYS = ("name", "entries", "nbytes", "hits", "exact", "detail", "error", "push")


def print_scores(terminal: Terminal, scores: Scores) -> None:
    """Print the table of the unbounded memory, then one table per group."""
    groups = {"all frames": [scores.unbounded]} | scores.by_entries | scores.by_bytes
    for caption, group in groups.items():
        title = f"{scores.unbounded.asked} trailer frames looked up in the film, {caption}"
        table = Table(box=None, pad_edge=False, header_style="dim", collapse_padding=True)
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "memory" else "right", no_wrap=name != "memory")
        for row in table_of("", group)["rows"]:
            table.add_row(*(str(row[key]) for key in _KEYS), style="bold" if row["best"] else "")
        terminal.print(title, style="bold")
        terminal.print(table)
        terminal.line()
    terminal.print(
        f"found: within {TOLERANCE:g} s, or inside a merged span of at most {LONGEST_SPAN:g} s; exact: the span's "
        "length counts as error; detail: cosine of the answer's tokens with the true frame's; error: median; push: "
        "median of one frame; calibrated unless told otherwise",
        style="dim",
    )
