"""Call the vision tower for sessions; sessions of one stream share its work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vmemory.models.adapter import Adapter, Clip, Encoded, Inputs, on_device


class Tower:
    """The vision tower of a model, as sessions call it.

    Args:
        model: The model.
        adapter: The adapter of its family.
        processor: As in `VideoSession`.
        shared: Keep the last frames with their tokens, for further sessions that ask for the same frames.

    Attributes:
        calls: Number of calls of the tower so far.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, processor: object, *, shared: bool = False) -> None:
        self.model, self.adapter, self.processor, self.shared = model, adapter, processor, shared
        self.calls = 0
        self._last: tuple[Tensor, tuple[int, int], tuple[Clip, Any]] | None = None

    def inputs(self, inputs: Inputs) -> tuple[Clip, Any]:
        """Encode one video of ready inputs; return its tokens and the tower's output."""
        return self._counted(self.adapter.encode(self.model, on_device(self.model, inputs)))

    def frames(self, frames: Tensor, size: tuple[int, int]) -> tuple[Clip, Any]:
        """Encode frames `[n, 3, h, w]` at a size (H, W); return their tokens and the tower's output."""
        last = self._last
        if last is not None and last[1] == size and torch.equal(last[0], frames):
            return last[2]
        found = self._counted(self.adapter.encode_frames(self.model, frames, self.processor, size))
        if self.shared:
            self._last = frames, size, found
        return found

    def _counted(self, encoded: Encoded) -> tuple[Clip, Any]:
        if len(encoded.clips) != 1:
            raise ValueError(f"inputs: expected one video, got {len(encoded.clips)}")
        self.calls += 1
        return encoded.clips[0], encoded.output
