"""Draw the charts of trailer localisation: moments found over bytes held."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from vmemory.cli.timeline import Palette
from vmemory.eval.setups import Setup
from vmemory.eval.trailer import Score

# policies that decide by frame number only
_BLIND = ("uniform", "reservoir", "recent", "unbounded")
_COUNTS: tuple[tuple[str, Callable[[Score], float]], ...] = (
    ("found", lambda score: score.hits),
    ("found exactly", lambda score: score.exact),
    ("detail", lambda score: score.detail),
)
_WIDTH, _LEFT, _NAMES, _GAP = 12.0, 0.5, 1.85, 0.55


def label(setup: Setup) -> str:
    """Return a memory's name in tables."""
    name = setup.name
    if setup.policy == "dual":
        return f"{name}, untrained"
    if not setup.calibrated and setup.policy not in _BLIND:
        name += ", not calibrated"
    return name if setup.dtype == "float16" else f"{name}, {setup.dtype}"


def draw_curve(groups: Sequence[Sequence[Score]], unbounded: Score, palette: Palette) -> bytes:
    """Draw a PNG of 1,800 pixels width: found, found exactly and detail over bytes, for 16-bit tokens."""
    panels = []
    for title, count in _COUNTS:
        lines = _lines(groups, "float16", count)
        panels.append((title, lines, count(unbounded)))
    return _draw(panels, unbounded, palette)


def draw_storage(groups: Sequence[Sequence[Score]], unbounded: Score, palette: Palette) -> bytes:
    """Draw a PNG of 1,800 pixels width: found over bytes, with a panel for each storage dtype."""
    dtypes = dict.fromkeys(score.setup.dtype for group in groups for score in group)
    panels = [(f"found, {dtype}", _lines(groups, dtype, _COUNTS[0][1]), unbounded.hits) for dtype in dtypes]
    return _draw(panels, unbounded, palette)


Lines = dict[Setup, tuple[list[float], list[float]]]


def _lines(groups: Sequence[Sequence[Score]], dtype: str, count: Callable[[Score], float]) -> Lines:
    """Return MiB and counts of each memory; of the hierarchical memory only the paper's rule."""
    lines: Lines = {}
    for score in (score for group in groups for score in group):
        if score.setup.dtype == dtype and score.setup.rule in (None, "paper"):
            x, y = lines.setdefault(score.setup._replace(dtype=""), ([], []))
            x.append(score.nbytes / 2**20)
            y.append(count(score))
    return lines


def _draw(panels: Sequence[tuple[str, Lines, float]], unbounded: Score, palette: Palette) -> bytes:
    """Draw panels side by side, with the lines' names at the right.

    Solid: entries of several sizes or of 1/9 of a frame's tokens; dashed: whole frames; horizontal: a memory without
    bounds.
    """
    figure = Figure((_WIDTH, 4.6), dpi=150, facecolor=palette.page)
    FigureCanvasAgg(figure)
    width = (_WIDTH - _LEFT - _NAMES - (len(panels) - 1) * _GAP) / len(panels)
    colours = dict(zip(("hierarchical", "uniform", "merging", "episodic"), palette.tiers, strict=True))
    widest = max((setup.keep or 0 for _, lines, _ in panels for setup in lines), default=0)
    for place, (title, lines, ceiling) in enumerate(panels):
        left = _LEFT + place * (width + _GAP)
        axis = figure.add_axes((left / _WIDTH, 0.09, width / _WIDTH, 0.81), facecolor="none")
        axis.set_title(title, loc="left", color=palette.ink, fontsize=10.5, pad=10)
        top = 1.0 if title == "detail" else unbounded.asked
        ends = []
        for setup, (x, y) in lines.items():
            colour = colours.get(setup.policy, palette.faint)
            style = (0, (2, 2)) if setup.keep == widest else "-"
            axis.plot(x, y, color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=4, zorder=3)
            ends.append((y[-1], setup.name, colour))
        axis.axhline(ceiling, color=palette.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        _frame(axis, top, palette)
        if place == len(panels) - 1:
            ends.append((ceiling, f"unbounded, {unbounded.nbytes / 2**20:.0f} MiB", palette.ink))
            _name(axis, ends, top)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=palette.page)
    return buffer.getvalue()


def _name(axis: Axes, ends: Sequence[tuple[float, str, str]], top: float) -> None:
    """Place labels at the lines' ends, without overlaps and inside the axis."""
    step = 0.062 * top
    ordered = sorted(ends, reverse=True)
    places: list[float] = []
    for end, _, _ in ordered:
        places.append(min(end, places[-1] - step) if places else end)
    floor = 0.0
    for i in reversed(range(len(places))):
        places[i] = max(places[i], floor)
        floor = places[i] + step
    for at, (_, text, colour) in zip(places, ordered, strict=True):
        axis.annotate(
            text, (1.03, at), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=9,
            annotation_clip=False,
        )  # fmt: skip


def _frame(axis: Axes, top: float, palette: Palette) -> None:
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.04 * top, 1.04 * top)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g} MiB"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(colors=palette.faint, labelsize=8.5, length=0, which="both")
    for side in axis.spines.values():
        side.set_visible(False)
    axis.grid(color=palette.grid, linewidth=0.6, zorder=0)
