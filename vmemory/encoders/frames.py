"""Encode pictures and sentences as tokens, concepts and vectors of a joint space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmemory.encoders.conse import class_vectors, conse_embedding, imagenet_classes
from vmemory.encoders.efficientnet import EfficientNetLite
from vmemory.encoders.minilm import SentenceEncoder


class Concept(NamedTuple):
    """The name of an ImageNet class and its probability."""

    name: str
    probability: float


class FrameEncoder:
    """Encoder of frames and sentences: EfficientNet-Lite tokens, ImageNet concepts, and a joint space.

    ConSE maps frames into the 384 dimensions of all-MiniLM-L6-v2. No part was trained on pairs of images and texts, so
    concepts are the nearest of 1,000 ImageNet classes, not descriptions. The sentence encoder is loaded on first use.

    Args:
        variant: `"lite2"` (9 x 9 tokens, 260 pixels) or `"lite0"` (7 x 7, 224 pixels).
        batch_size: frames a forward pass.
        device: where the image encoder runs; results are on the CPU.
        dtype: dtype of the image encoder's arithmetic; results are float32.
        cache: cache directory of the class vectors; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.

    Attributes:
        name: identifies encoder and arithmetic, e.g. in the name of a cache file.
        grid: side of the token grid.
        dim: 1280.
        frame_size: shorter side of frames that need no further scaling, for `FrameSource(size=...)`.

    Raises:
        AssetError: the weights' package is not installed or not intact.
    """

    def __init__(
        self,
        variant: str = "lite2",
        batch_size: int = 8,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        cache: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.model = EfficientNetLite.pretrained(variant).to(device, dtype)
        self.name = f"efficientnet-{variant}-{str(dtype).removeprefix('torch.')}"
        self.grid, self.dim = self.model.grid, self.model.dim
        self.frame_size = self.model.size + 32
        self._cache = cache
        self._sentences: SentenceEncoder | None = None
        self._vectors: Tensor | None = None

    def encode(self, frames: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """Return tokens `[B, grid, grid, 1280]` float32 of uint8 RGB frames `[H, W, 3]`."""
        tokens = torch.empty(len(frames), self.grid, self.grid, self.dim)
        for first in range(0, len(frames), self.batch_size):
            batch = frames[first : first + self.batch_size]
            with torch.inference_mode():
                encoded = self.model.tokens(batch)
            tokens[first : first + len(batch)] = encoded
        return tokens

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return ImageNet logits `[..., 1000]` float32 of tokens or pooled tokens `[..., 1280]`."""
        return self.model.logits(tokens.to(self.model._fc.weight.device)).float().cpu()

    def concepts(self, pooled: Tensor, k: int = 5) -> list[list[Concept]]:
        """Return the k likeliest ImageNet classes of each row of `[B, 1280]`, or of one vector `[1280]`."""
        if pooled.dim() not in (1, 2) or pooled.shape[-1] != self.dim:
            raise ValueError(f"pooled: expected [B, {self.dim}] or [{self.dim}], got {list(pooled.shape)}")
        best = self.logits(pooled.reshape(-1, self.dim)).softmax(-1).topk(k)
        names = [entry.name for entry in imagenet_classes()]
        return [
            [Concept(names[i], p) for i, p in zip(row, values, strict=True)]
            for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def text(self, query: str) -> Tensor:
        """Return the unit vector `[384]` float32 of a sentence."""
        return self._sentence_encoder().encode(query)[0]

    def joint(self, tokens: Tensor, top: int = 10) -> Tensor:
        """Return unit vectors `[..., 384]` float32 of tokens or pooled tokens `[..., 1280]`, comparable with `text`.

        Apply `center` to the vectors of a stream to see differences within the stream.
        """
        if self._vectors is None:
            self._vectors = class_vectors(self._sentences, self._cache)
        return conse_embedding(self.logits(tokens), self._vectors, top)

    def _sentence_encoder(self) -> SentenceEncoder:
        if self._sentences is None:
            self._sentences = SentenceEncoder()
        return self._sentences
