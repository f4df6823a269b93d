"""A picture of a training's losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vmemory._files import replacing


def loss_picture(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw losses against steps and write the picture.

    Args:
        history: Lines of the log with `step`, such as `Trainer.state.log_history`; `loss`, `eval_loss` and
            `memory_bank_loss` are drawn.
        path: Of the picture, a PNG file.

    Raises:
        ValueError: No line has a loss.
    """
    from matplotlib.figure import Figure

    names = {"loss": "training", "eval_loss": "validation", "memory_bank_loss": "self-distillation"}
    lines = {name: [(line["step"], line[name]) for line in history if name in line] for name in names}
    if not any(lines.values()):
        raise ValueError("history: expected lines with a loss, got none")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="." if len(points) < 40 else None, label=names[name])
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
