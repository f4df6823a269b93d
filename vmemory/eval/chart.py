"""Draw an evaluation: accuracy over the tokens that a memory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vmemory._files import replacing
from vmemory.eval.cells import UNCOMPRESSED
from vmemory.eval.scores import BLIND, Row

_INK, _FAINT, _GRID = "#222222", "#777777", "#e6e6e6"
_COLOURS = ("#0b6e99", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#8c564b", "#17a2a2", "#b5179e", "#5c677d")


def draw_accuracy(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """Write a PNG with a panel for all groups that there are of now, past and past over 120 s.

    A line is a policy, with its 95 % intervals. Horizontal lines are the uncompressed model and the best blind guess.

    Args:
        rows: The scores.
        path: The file.
        title: Above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    groups = [group for group in ("now", "past", "over 120 s") if any(group in row.right for row in rows)] or ["all"]
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.tokens is not None and row.name != UNCOMPRESSED:
            lines[row.name.split("@")[0]].append(row)
    figure = Figure((4.4 * len(groups) + 1.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_INK)
    ticks = sorted({round(row.tokens) for held in lines.values() for row in held if row.tokens})
    for axis, group in zip(axes, groups, strict=True):
        name = f"past, {group}" if group.endswith(" s") else group
        axis.set_title(
            f"{name} ({max(row.right[group].questions for row in rows if group in row.right)} questions)",
            fontsize=10,
            loc="left",
        )
        for number, (policy, held) in enumerate(lines.items()):
            ordered = sorted((row for row in held if group in row.right), key=lambda row: row.tokens or 0.0)
            # a little apart, so that intervals do not cover each other
            at = [(row.tokens or 0.0) * 1.012 ** (number - len(lines) / 2) for row in ordered]
            scores = [row.right[group] for row in ordered]
            colour = _COLOURS[number % len(_COLOURS)]
            spans = [[s.mean - s.low for s in scores], [s.high - s.mean for s in scores]]
            axis.errorbar(
                at,
                [s.mean for s in scores],
                spans,
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.5,
                elinewidth=0.7,
                label=policy,
            )
        for row in rows:
            if row.name in (UNCOMPRESSED, BLIND) and group in row.right:
                style = "--" if row.name == UNCOMPRESSED else ":"
                label = f"uncompressed, {row.tokens:.0f} tokens" if row.tokens else "blind guess"
                axis.axhline(row.right[group].mean, color=_INK, linestyle=style, linewidth=1, label=label)
        axis.set_ylim(0, 1.02)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("visual tokens in the prompt", fontsize=9, color=_FAINT)
        axis.grid(color=_GRID, linewidth=0.6)
        axis.tick_params(labelsize=8.5, colors=_FAINT, length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("share of right answers", fontsize=9, color=_FAINT)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8.5)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
