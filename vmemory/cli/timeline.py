"""Draw the timeline of a memory's entries over a video, for light and dark pages."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vmemory.banks import format_bytes
from vmemory.cli.common import Question, timecode
from vmemory.cli.errors import UserError
from vmemory.cli.terminal import clean
from vmemory.search.video_search import VideoSearch
from vmemory.sources.pictures import rgb


class Palette(NamedTuple):
    """Colours of a figure; tiers in order, cycled if there are more."""

    page: str
    ink: str
    faint: str
    grid: str
    tiers: tuple[str, ...]
    answer: str


LIGHT = Palette("#fbfaf7", "#22201d", "#8d877c", "#e3dfd6", ("#b3432b", "#c98a1b", "#2f6b70", "#6a5a8c"), "#22201d")
DARK = Palette("#15161a", "#ebe8e1", "#8b8880", "#2e3036", ("#e8785a", "#e9b44c", "#66b3b0", "#a897d0"), "#f4f1ea")
# largest number of pictures in the film strip, and the lanes' heights in inches
_STRIP, _LANE, _BYTES = 14, 0.34, 0.85
# seconds between labels of the time axis
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


def draw_timeline(
    memory: VideoSearch, questions: Sequence[Question], bound: tuple[str, int], duration: float, palette: Palette
) -> bytes:
    """Draw a PNG of 1,800 pixels width: film strip, one lane per tier, dropped frames, questions, bytes in use.

    Args:
        memory: The memory.
        questions: Questions; the answers of each get a lane.
        bound: The memory's limit: a word for it, and bytes.
        duration: Seconds of the whole video; an unseen part stays empty.
        palette: Colours.
    """
    lanes = len(memory.bank.tiers) + (memory.bank.counts()["dropped"] > 0) + len(questions)
    width, left, right = 12.0, 1.75, 0.25
    strip = (width - left - right) / _STRIP * 9 / 16
    heights = [strip, lanes * _LANE, _BYTES]
    gap, top, bottom = 0.12, 0.1, 0.42
    total = sum(heights) + 2 * gap + top + bottom
    figure = Figure((width, total), dpi=150, facecolor=palette.page)
    FigureCanvasAgg(figure)
    axes, y = [], total - top
    for height in heights:
        y -= height
        axes.append(figure.add_axes((left / width, y / total, 1 - (left + right) / width, height / total)))
        y -= gap
    for axis in axes[1:]:
        axis.tick_params(colors=palette.faint, labelsize=8, length=0)
    _film_strip(axes[0], memory, duration)
    _lanes(axes[1], memory, questions, palette)
    _bytes(axes[2], memory, bound, palette)
    for axis in axes[1:]:
        axis.set_xlim(0, duration)
        axis.set_facecolor("none")
        for side in axis.spines.values():
            side.set_visible(False)
        axis.grid(axis="x", color=palette.grid, linewidth=0.6, zorder=0)
        axis.set_xticks(np.arange(0, duration, next((s for s in _STEPS if duration <= 12 * s), duration)))
    axes[1].tick_params(labelbottom=False)
    axes[2].xaxis.set_major_formatter(FuncFormatter(lambda at, _: timecode(max(at, 0))))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=palette.page)
    return buffer.getvalue()


def _film_strip(axis: Axes, memory: VideoSearch, duration: float) -> None:
    """Draw from each stretch of the video the picture with most detail, which is the largest file."""
    from PIL import Image

    axis.set_axis_off()
    axis.set_xlim(0, _STRIP)
    axis.set_ylim(0, 1)
    entries = memory.entries
    cells = (entries.time.numpy() * (_STRIP / duration)).astype(int).clip(max=_STRIP - 1)
    for cell in range(_STRIP):
        there = (memory.thumbnail(entries, int(i)) for i in np.flatnonzero(cells == cell))
        jpeg = max((data for data in there if data), key=len, default=None)
        if jpeg is None:
            continue
        try:
            picture = rgb(Image.open(io.BytesIO(jpeg)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"thumbnails: not a picture ({error})") from error
        axis.imshow(_wide(picture), extent=(cell + 0.02, cell + 0.98, 0.0, 1.0), aspect="auto", interpolation="lanczos")
    axis.set_xlim(0, _STRIP)
    axis.set_ylim(0, 1)


def _wide(picture: np.ndarray) -> np.ndarray:
    """Crop the middle of a picture to 16 : 9."""
    height, width = picture.shape[:2]
    if width * 9 > height * 16:
        cut = (width - height * 16 // 9) // 2
        return picture[:, cut : width - cut]
    cut = (height - width * 9 // 16) // 2
    return picture[cut : height - cut]


def _lanes(axis: Axes, memory: VideoSearch, questions: Sequence[Question], palette: Palette) -> None:
    entries, history = memory.entries, memory.history
    level, start, stop = entries.level.numpy(), entries.start.numpy(), entries.stop.numpy()
    labels: list[tuple[str, str]] = []
    for place, tier in enumerate(memory.bank.tiers):
        there = level == tier.level
        colour = palette.tiers[place % len(palette.tiers)]
        labels.append((f"{tier.name} · {tier.grid[0]}×{tier.grid[1]}", colour))
        _spans(axis, start[there], stop[there], -place, colour)
    if count := memory.bank.counts()["dropped"]:
        gone, lane = history.time[history.entry < 0], -len(labels)
        labels.append((f"dropped · {count}", palette.faint))
        axis.vlines(gone, lane - 0.22, lane + 0.22, color=palette.faint, linewidth=0.5, alpha=0.6, zorder=2)
    for question in questions:
        lane = -len(labels)
        kind = "like " if question.image is not None else ""
        labels.append((textwrap.shorten(clean(kind + question.text), 25, placeholder=" …"), palette.ink))
        times = [answer.time for answer in question.answers]
        sizes = [34.0 if rank == 0 else 13.0 for rank in range(len(times))]
        axis.scatter(times, [lane] * len(times), s=sizes, color=palette.answer, linewidths=0, zorder=4)
        if question.truth is not None:
            marker: dict[str, Any] = {"marker": "D", "s": 75, "facecolors": "none", "edgecolors": palette.tiers[0]}
            axis.scatter([question.truth], [lane], zorder=3, linewidths=1.2, **marker)
    axis.set_ylim(-len(labels) + 0.5, 0.5)
    axis.set_yticks([-place for place in range(len(labels))], [text for text, _ in labels], parse_math=False)
    for tick, (_, colour) in zip(axis.get_yticklabels(), labels, strict=True):
        tick.set_color(colour)
        tick.set_fontsize(8.5)


def _spans(axis: Axes, start: np.ndarray, stop: np.ndarray, lane: int, colour: str) -> None:
    """Draw merged spans as bars of alternating height, and single frames as ticks."""
    merged = stop > start
    axis.vlines(start[~merged], lane - 0.36, lane + 0.36, color=colour, linewidth=1.1, zorder=3)
    height = np.where(np.arange(int(merged.sum())) % 2, 0.44, 0.62)
    axis.barh(
        np.full(int(merged.sum()), lane), (stop - start)[merged], left=start[merged], height=height, color=colour,
        alpha=0.85, linewidth=0, zorder=3,
    )  # fmt: skip


def _bytes(axis: Axes, memory: VideoSearch, bound: tuple[str, int], palette: Palette) -> None:
    history, (word, budget) = memory.history, bound
    axis.fill_between(history.time, history.nbytes, color=palette.tiers[2], alpha=0.22, linewidth=0, zorder=2)
    axis.plot(history.time, history.nbytes, color=palette.tiers[2], linewidth=1.3, zorder=3)
    axis.axhline(budget, color=palette.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axis.set_ylim(0, 1.12 * budget)
    axis.set_yticks([0.5 * budget, budget], ["in use", f"{word} {format_bytes(budget)}"])
    for tick, colour in zip(axis.get_yticklabels(), (palette.tiers[2], palette.ink), strict=True):
        tick.set_color(colour)
        tick.set_fontsize(8.5)
