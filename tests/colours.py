"""A tiny encoder that sees colours only, and clips of plain colours to show it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vmemory.sources import Frame

RED, GREEN, BLUE, GREY = (230, 20, 20), (20, 230, 20), (20, 20, 230), (128, 128, 128)
WORDS = {"red": 0, "green": 1, "blue": 2}


class Colours:
    """Tokens are the mean colours of a 9 x 9 grid, and then zeros; sentences are the colours they name."""

    name, grid, dim, frame_size, batch_size = "colours", 9, 4, 18, 4

    def encode(self, frames: Sequence[np.ndarray]) -> Tensor:
        tokens = torch.zeros(len(frames), self.grid, self.grid, self.dim)
        for i, frame in enumerate(frames):
            image = torch.from_numpy(frame).float().permute(2, 0, 1)[None] / 255
            tokens[i, ..., :3] = F.adaptive_avg_pool2d(image, self.grid)[0].permute(1, 2, 0)
        return tokens

    def joint(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens[..., :3], dim=-1)

    def text(self, query: str) -> Tensor:
        return F.one_hot(torch.tensor(WORDS[query]), 3).float()

    def concepts(self, pooled: Tensor, k: int) -> list[list[tuple[str, float]]]:
        order = pooled[:, :3].argsort(dim=1, descending=True)[:, :k].tolist()
        names = list(WORDS)
        return [[(names[i], 0.5**rank) for rank, i in enumerate(row)] for row in order]


def frames_of(colours: Sequence[tuple[int, int, int]], fps: float = 1.0, first: int = 0) -> list[Frame]:
    """Frames 32 x 18 of plain colours, the i-th at `(first + i) / fps` seconds."""
    plain = [np.full((18, 32, 3), colour, np.uint8) for colour in colours]
    return [Frame(image, (first + i) / fps, first + i) for i, image in enumerate(plain)]


def write_clip(
    path: Path, colours: Sequence[tuple[int, int, int]], fps: int = 4, size: tuple[int, int] = (64, 36)
) -> Path:
    """A video whose i-th frame has the i-th colour."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": "4", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i, colour in enumerate(colours):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), colour, np.uint8), "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
