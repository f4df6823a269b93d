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

# how tokens in few bits are drawn
MARKERS = {"int8": "s", "int4": "^"}


def label(score: Score) -> str:
    """How a memory is called in tables and charts."""
    name = f"{score.policy}, calibrated" if score.calibrated else score.policy
    return f"{name}, {score.dtype}" if score.dtype in MARKERS else name


def draw_storage(groups: Sequence[Sequence[Score]], unbounded: Score, palette: Palette) -> bytes:
    """A PNG 1,800 pixels wide: moments found over bytes held, a point for each memory, size and way to store tokens.

    A line leads from a memory's tokens in 16 bits to the same in 8 and 4.
    """
    figure = Figure((12.0, 5.2), dpi=150, facecolor=palette.page)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.055, 0.08, 0.775, 0.84), facecolor="none")
    lines: dict[tuple[str, bool, int], list[Score]] = {}
    for score in (score for group in groups for score in group):
        lines.setdefault((score.policy, score.calibrated, score.held), []).append(score)
    colours, ends = _colours(palette), {}
    for (policy, calibrated, _), scores in lines.items():
        scores.sort(key=lambda score: score.nbytes)
        colour = colours.get(policy, palette.faint)
        x, y = [s.nbytes / 2**20 for s in scores], [s.hits for s in scores]
        axis.plot(x, y, color=colour, linewidth=0.9, linestyle="-" if calibrated else (0, (2, 2)), zorder=2)
        for s, bytes_held, hits in zip(scores, x, y, strict=True):
            axis.plot(bytes_held, hits, MARKERS.get(s.dtype, "o"), color=colour, markersize=6, zorder=3)
        ends[policy, calibrated] = (float(y[-1]), label(scores[-1]._replace(dtype="")), colour)
    axis.axhline(unbounded.hits, color=palette.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    named = [*ends.values(), (float(unbounded.hits), f"unbounded, {unbounded.nbytes / 2**20:.0f} MiB", palette.ink)]
    _name(axis, named, unbounded.asked)
    for dtype, marker in (("float16", "o"), *MARKERS.items()):
        axis.plot([], [], marker, color=palette.ink, markersize=6, label=dtype)
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.92), frameon=False, fontsize=9, labelcolor=palette.ink)
    _frame(axis, unbounded.asked, palette)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=palette.page)
    return buffer.getvalue()


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
    _name(axis, ends, unbounded.asked)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=palette.page)
    return buffer.getvalue()


def _name(axis: Axes, ends: Sequence[tuple[float, str, str]], asked: int) -> None:
    """Labels at the lines' ends, pushed apart where they would overlap."""
    step, at = 0.072 * asked, float("inf")
    for end, text, colour in sorted(ends, reverse=True):
        at = min(end, at - step)
        axis.annotate(
            text, (1.015, at), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=9,
            annotation_clip=False,
        )  # fmt: skip


def _colours(palette: Palette) -> dict[str, str]:
    return dict(zip(("hierarchical", "uniform", "merging", "episodic"), palette.tiers, strict=True))


def _lines(axis: Axes, groups: Sequence[Sequence[Score]], count: str, palette: Palette) -> list[tuple[float, str, str]]:
    """One line a memory; where each ends, its name and its colour."""
    colours, ends = _colours(palette), []
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
