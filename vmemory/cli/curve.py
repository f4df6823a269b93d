"""The chart of trailer localisation: moments found again against bytes held."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from vmemory.cli.timeline import Palette
from vmemory.eval.trailer import Score


def label(score: Score) -> str:
    """How a memory is called in tables and charts."""
    return f"{score.policy}, calibrated" if score.calibrated else score.policy


def draw_curve(groups: Sequence[Sequence[Score]], unbounded: Score, palette: Palette) -> bytes:
    """A PNG 1,800 pixels wide: moments found over bytes held, by both counts; dashed: a memory without bounds."""
    figure = Figure((12.0, 3.9), dpi=150, facecolor=palette.page)
    FigureCanvasAgg(figure)
    for left, count, title in ((0.055, "hits", "found"), (0.465, "exact", "found exactly")):
        axis = figure.add_axes((left, 0.1, 0.375, 0.78), facecolor="none")
        axis.set_title(title, loc="left", color=palette.ink, fontsize=10.5, pad=10)
        ends = _lines(axis, groups, count, palette)
        axis.axhline(getattr(unbounded, count), color=palette.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        _frame(axis, unbounded.asked, palette)
    ends.append((unbounded.exact, f"unbounded, {unbounded.nbytes / 2**20:.0f} MiB", palette.ink))
    # labels at the lines' ends, pushed apart where they would overlap
    step, at = 0.072 * unbounded.asked, float("inf")
    for end, text, colour in sorted(ends, reverse=True):
        at = min(end, at - step)
        axis.annotate(
            text, (1.015, at), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=palette.page)
    return buffer.getvalue()


def _lines(axis: Axes, groups: Sequence[Sequence[Score]], count: str, palette: Palette) -> list[tuple[float, str, str]]:
    """One line a memory; where each ends, its name and its colour."""
    named = ("hierarchical", "uniform", "merging", "episodic")
    colours = dict(zip(named, palette.tiers, strict=True))
    ends = []
    for scores in zip(*groups, strict=True):
        colour = colours.get(scores[0].policy, palette.faint)
        dashed = not scores[0].calibrated and any(s.policy == scores[0].policy and s.calibrated for s in groups[0])
        hits = [float(getattr(s, count)) for s in scores]
        axis.plot(
            [s.nbytes / 2**20 for s in scores], hits, color=colour, linestyle=(0, (2, 2)) if dashed else "-",
            linewidth=1.8, marker="o", markersize=4.5, zorder=3,
        )  # fmt: skip
        ends.append((hits[-1], label(scores[0]), colour))
    return ends


def _frame(axis: Axes, asked: int, palette: Palette) -> None:
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.04 * asked, 1.04 * asked)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g} MiB"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(colors=palette.faint, labelsize=8.5, length=0, which="both")
    for side in axis.spines.values():
        side.set_visible(False)
    axis.grid(color=palette.grid, linewidth=0.6, zorder=0)
