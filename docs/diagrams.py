"""Draw the pictures of docs/concepts.md: `python docs/diagrams.py` writes tiers.png and prompt.png beside itself."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle

from vmemory.banks import HierarchicalBank

HERE = Path(__file__).parent
PAPER, INK, QUIET = "#faf9f5", "#1f1e1b", "#8a887f"
TIERS = ("#b0392b", "#c8861d", "#2a6a70")
FRAMES, SCENES = 64, (14, 30, 33, 52)


def film() -> torch.Tensor:
    """Return `[64, 4, 4, 16]`: five scenes with drifting frames."""
    draw = torch.Generator().manual_seed(3)
    frames, scene = [], torch.randn(16, generator=draw)
    for t in range(FRAMES):
        if t in SCENES:
            scene = torch.randn(16, generator=draw)
        scene = scene + 0.12 * torch.randn(16, generator=draw)
        frames.append(scene + 0.1 * torch.randn(4, 4, 16, generator=draw))
    return torch.stack(frames)


def tiers() -> None:
    """Draw the frames and tiers of a small hierarchical memory after each push."""
    bank = HierarchicalBank(dim=16, grid=(4, 4), capacity=(4, 6, 12), grid_size=((4, 4), (2, 2), (1, 1)))
    held = np.full((FRAMES, FRAMES), np.nan)
    for t, frame in enumerate(film()):
        bank.push(frame[None], time=float(t))
        tokens = bank.read()
        held[tokens.frame.numpy(), t] = tokens.level.numpy()
    figure, (axes, side) = plt.subplots(1, 2, figsize=(9, 4.4), width_ratios=(5, 1.25), facecolor=PAPER)
    axes.imshow(
        held, cmap=ListedColormap(TIERS), vmin=0, vmax=2, origin="lower", interpolation="nearest", aspect="auto"
    )
    for cut in SCENES:
        axes.axhline(cut - 0.5, color=QUIET, linewidth=0.6, linestyle=(0, (4, 3)))
    axes.text(40.5, 43.5, "the newest frame", rotation=30, rotation_mode="anchor", fontsize=8, color=INK, ha="right")
    axes.text(0.5, SCENES[-1] + 0.2, "a scene begins", fontsize=8, color=QUIET)
    axes.set_xlabel("frames pushed", color=QUIET)
    axes.set_ylabel("frame of the stream", color=QUIET)
    _quiet(axes)
    side.set_xlim(0, 5)
    side.set_ylim(0, 14)
    side.set_aspect("equal")
    side.axis("off")
    rows = (("4 frames of 4 × 4", 4, 9.0), ("6 frames of 2 × 2", 2, 4.4), ("12 frames of 1 × 1", 1, 0.6))
    for (words, cells, bottom), colour in zip(rows, TIERS, strict=True):
        for i in range(cells):
            for j in range(cells):
                size = 3 / 4 - 0.08
                side.add_patch(Rectangle((0.2 + j * 0.75, bottom + i * 0.75), size, size, color=colour))
        side.text(0.2, bottom + cells * 0.75 + 0.35, words, fontsize=9, color=colour)
    figure.tight_layout()
    figure.savefig(HERE / "tiers.png", dpi=170, facecolor=PAPER)


def prompt() -> None:
    """Draw a prompt before and after: kept placeholders, a removed time, unchanged positions."""
    before = ["w", "w", "t", "v", "v", "v", "v", "t", "v", "v", "v", "v", "t", "v", "v", "v", "v", "w", "w", "w"]
    # a frame pooled to one token owns its cell (1, 1)
    keep = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1]
    colours = {"w": "#d9d6cc", "t": TIERS[1], "v": TIERS[2]}
    figure, axes = plt.subplots(figsize=(9, 2.9), facecolor=PAPER)
    axes.set_xlim(-3.6, 20.3)
    axes.set_ylim(-0.35, 4.2)
    axes.axis("off")
    at = 0
    for i, (kind, stays) in enumerate(zip(before, keep, strict=True)):
        axes.add_patch(Rectangle((i + 0.06, 2.6), 0.88, 0.7, color=colours[kind], alpha=1 if stays else 0.22))
        if not stays:
            continue
        axes.add_patch(Rectangle((at + 0.06, 0.5), 0.88, 0.7, color=colours[kind]))
        arrow = FancyArrowPatch(
            (i + 0.5, 2.55), (at + 0.5, 1.25), arrowstyle="-|>", mutation_scale=7, color=QUIET, linewidth=0.7
        )
        axes.add_patch(arrow)
        axes.text(at + 0.5, 0.08, str(i), ha="center", fontsize=8, color=QUIET)
        at += 1
    for label, y in (("the caller's prompt", 2.95), ("what the model sees", 0.85), ("came from", 0.16)):
        axes.text(-0.25, y, label, ha="right", va="center", fontsize=9, color=INK if y > 0.5 else QUIET)
    words = ("first frame, whole", "second frame, gone", "third frame, pooled")
    for k, text in enumerate(words):
        axes.text(5 + 5 * k, 3.55, text, ha="center", fontsize=9, color=INK)
    legend = (("text", "w"), ("a frame's time", "t"), ("visual token", "v"))
    for k, (text, kind) in enumerate(legend):
        axes.add_patch(Rectangle((16.3, 1.02 - 0.46 * k), 0.34, 0.3, color=colours[kind]))
        axes.text(16.85, 1.17 - 0.46 * k, text, va="center", fontsize=8.5, color=INK)
    figure.tight_layout(pad=0.3)
    figure.savefig(HERE / "prompt.png", dpi=170, facecolor=PAPER)


def _quiet(axes: Axes) -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=QUIET, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    matplotlib.use("agg")
    tiers()
    prompt()
