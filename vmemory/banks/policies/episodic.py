"""Frames unlike those already held."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import register_policy
from vmemory.ops._checks import check_choice
from vmemory.ops.similarity_topk import similarity_topk
from vmemory.reference.bank_layout import BankState


@register_policy
class EpisodicBank(SingleTierBank):
    """A memory of frames unlike each other: a frame replaces the most similar held one, of equals the first.

    A frame whose similarity is NaN counts as the most similar, so a broken slot is the first to be taken.

    Args:
        dim, grid, capacity, grid_size, budget, streams, device, dtype, key_dim, adapter: As in `SingleTierBank`.
        level: The cosine is taken between the frames' means (`"mean"`), from a few values a slot, or over all values of
            the held frames (`"flat"`), which reads the whole memory for every frame and cannot leave channels out.

    Raises:
        ValueError: An argument does not fit; `"flat"` with a `key_dim` below `dim`.

    Source: the episodic memory of VLM² (arXiv 2511.20644), Algorithm 1 and Eq. 8, which leaves open over what the
    cosine is taken.
    """

    policy = "episodic"
    # its list is that of the first-in-first-out memory; what leaves is not
    rule = "recent"
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

    def choose(self, state: BankState, frames: Tensor, mask: Tensor | None) -> Tensor:
        if self.level == "flat":
            query, slots = self.entering(frames, mask), state.slots.view(*state.entry.shape[:2], -1)
            return similarity_topk(query[:, None], slots, 1).indices[:, 0, 0]
        # the frame's own norm is the same for all; argmax takes NaN for the largest, and the first of equals
        products = (state.descriptor[:, :, 0] * self.mean_of(frames, mask)[:, None]).sum(-1)
        return (products / state.norm[:, :, 0].clamp_min(1e-8)).argmax(1)
