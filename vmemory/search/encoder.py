"""The encoder interface of a video search, and the origin that is subtracted from its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vmemory.sources.video import Frame


class Encoder(Protocol):
    """The encoder interface of a video search; `vmemory.encoders.FrameEncoder` implements it."""

    name: str

    def encode(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Return tokens `[B, H, W, D]` float32 of uint8 RGB frames `[h, w, 3]`."""
        ...

    def joint(self, tokens: Tensor) -> Tensor:
        """Return unit vectors `[n, E]` of pooled tokens `[n, D]`, in the space of `text`."""
        ...

    def text(self, query: str) -> Tensor:
        """Return the unit vector `[E]` of a sentence."""
        ...

    def concepts(self, pooled: Tensor, k: int) -> Sequence[Sequence[tuple[str, float]]]:
        """Return the k likeliest names, with probabilities, of each row of `[n, D]`."""
        ...


def calibrate(encoder: Encoder, frames: Iterable[Frame], batch: int = 8) -> Tensor:
    """Return the mean token `[D]` float32 of some frames, an origin for `VideoSearch`.

    The common part of all frames of a video makes every pair of them similar, and a memory that merges or drops the
    most similar neighbours then depends on small differences. Subtracting the mean of the first minute removes the
    common part.

    Raises:
        ValueError: There is no frame.
    """
    total, count = torch.zeros(()), 0
    waiting = iter(frames)
    while images := [frame.image for frame in islice(waiting, batch)]:
        total = total + encoder.encode(images).mean((1, 2)).sum(0)
        count += len(images)
    if count == 0:
        raise ValueError("frames: expected at least one")
    return total / count
