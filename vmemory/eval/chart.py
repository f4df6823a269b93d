"""Draw an evaluation: accuracy over the tokens that a memory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vmemory._files import replacing
from vmemory.eval.cells import DEFAULT, UNCOMPRESSED
from vmemory.eval.scores import BLIND, Row
from vmemory.eval.tune import Tuned

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


def draw_tuning(found: Sequence[Tuned], path: Path) -> None:
    """Write a PNG: all trials over the tokens held with the best at each size, and the parameters' importance.

    Args:
        found: The results of `tune`.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9.6, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    scored = [trial for one in found for trial in one.trials if trial.score is not None]
    policies = list(dict.fromkeys(str(trial.config.get("memory_policy", DEFAULT)) for trial in scored))
    for number, policy in enumerate(policies):
        own = [trial for trial in scored if trial.config.get("memory_policy", DEFAULT) == policy]
        colour = _COLOURS[number % len(_COLOURS)]
        left.scatter([t.tokens for t in own], [t.score or 0 for t in own], s=16, color=colour, alpha=0.75, label=policy)
    front = pareto([(trial.tokens, trial.score or 0.0) for trial in scored])
    left.step([x for x, _ in front], [y for _, y in front], where="post", color=_INK, linewidth=1, label="best so far")
    left.set_title("trials, and the best score with so many tokens", fontsize=10, loc="left")
    left.set_xlabel("visual tokens held", fontsize=9, color=_FAINT)
    left.set_ylabel("score", fontsize=9, color=_FAINT)
    left.legend(frameon=False, fontsize=8)
    names = list(dict.fromkeys(name for one in found for name in one.importance))
    means = {name: sum(one.importance.get(name, 0.0) for one in found) / len(found) for name in names}
    ordered = sorted(names, key=lambda name: means[name])
    right.barh(ordered, [means[name] for name in ordered], color=_COLOURS[0], height=0.6)
    right.set_title("importance of each parameter", fontsize=10, loc="left")
    for axis in (left, right):
        axis.grid(color=_GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5, colors=_FAINT, length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, score) that no cheaper or equally cheap point reaches, by cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front
