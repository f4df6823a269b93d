"""The memory that keeps what is unlike anything it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.banks.quantized import AnyState
from vmemory.banks.slots import SlotBank
from vmemory.ops._checks import check_choice
from vmemory.ops.ring import slot_replace_


class EpisodicBank(SlotBank):
    """A frame takes the first free slot, then the slot of the held frame it is most like; of equals the first.

    A frame whose similarity is NaN counts as the most similar, so a broken slot is the first to be taken.

    Args:
        dim, grid, capacity, pooled, budget, streams, device, dtype, key_dim, adapter: As in `SingleTierBank`.
        level: The cosine is taken between the frames' means (`"mean"`), from a few values a slot, or over all values of
            the held frames (`"flat"`), which reads the whole memory for every frame and cannot leave channels out.

    Raises:
        ValueError: An argument does not fit; `"flat"` with a `key_dim` below `dim`.

    Source: the episodic memory of VLM² (arXiv 2511.20644), Algorithm 1 and Eq. 8, which leaves open over what the
    cosine is taken.
    """

    policy = "episodic"
    compares = True

    def __init__(self, *args: Any, level: str = "mean", **kwargs: Any) -> None:
        check_choice("level", level, ("mean", "flat"))
        super().__init__(*args, **kwargs)
        if level == "flat" and self.layout.key_dim != self.layout.dim:
            raise ValueError(f"key_dim: expected {self.layout.dim} for level 'flat', got {self.layout.key_dim}")
        if level == "flat" and self.quantized:
            raise ValueError(f"level: expected 'mean' for a bank in {self._config['dtype']}, got 'flat'")
        self.level = level
        self.reads_tokens = level == "flat"
        self._config["level"] = level

    def choose(
        self, state: AnyState, taken: Tensor, held: Tensor, fed: Tensor, descriptor: Tensor, tokens: Tensor | None
    ) -> Tensor:
        streams = torch.where(fed, torch.arange(fed.shape[0], device=fed.device), -1)
        slots, frames = state.descriptor, descriptor[:, None]
        if tokens is not None and self.level == "flat":
            slots, frames = state.slots.view(fed.shape[0], state.entry.shape[1], -1, self.layout.dim), tokens
        replaced = slot_replace_(slots, held.clone(), frames, streams)
        return torch.where(fed, torch.where(replaced >= 0, replaced, held), -1)
