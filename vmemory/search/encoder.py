"""What a memory stream needs of an encoder, and the origin that its tokens are taken about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vmemory.sources.video import Frame


class Encoder(Protocol):
    """What a memory stream needs of an encoder; `vmemory.encoders.FrameEncoder` is one."""

    name: str

    def encode(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Tokens `[B, H, W, D]` float32 of uint8 RGB frames `[h, w, 3]`."""
        ...

    def joint(self, tokens: Tensor) -> Tensor:
        """Unit vectors `[n, E]` of pooled tokens `[n, D]`, in the space of `text`."""
        ...

    def text(self, query: str) -> Tensor:
        """Unit vector `[E]` of a sentence."""
        ...

    def concepts(self, pooled: Tensor, k: int) -> Sequence[Sequence[tuple[str, float]]]:
        """The k likeliest names, with probabilities, of each row of `[n, D]`."""
        ...


def calibrate(encoder: Encoder, frames: Iterable[Frame], batch: int = 8) -> Tensor:
    """Mean token `[D]` float32 of some frames: an origin for `VideoSearch`.

    What all frames of a video have in common makes every pair of them look alike, and a memory that merges or drops the
    most similar neighbours then follows small differences in a large common part. Taken about the mean of the first
    minute, differences count.

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
