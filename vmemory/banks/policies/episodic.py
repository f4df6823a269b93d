"""Frames unlike those already held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import register_policy
from vmemory.ops._checks import check_choice
from vmemory.ops.grid_pool import grid_pool
from vmemory.ops.similarity_topk import similarity_topk, topk_checked
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
            query, slots = self._entering(frames, mask), state.slots.view(*state.entry.shape[:2], -1)
            return similarity_topk(query[:, None], slots, 1).indices[:, 0]
        cells = frames[..., : self.layout.key_dim]
        if mask is not None:
            cells = torch.where(mask[..., None], cells, 0)
        means = state.descriptor[:, :, 0]
        # a sum has the cosines of its mean
        total = cells.flatten(1, 2).sum(1, keepdim=True, dtype=means.dtype)
        return topk_checked(total, means, 1, norm=state.norm[:, :, 0]).indices[:, 0]

    def _entering(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return frames `[S, H, W, D]` as the bank will hold them, `[S, n · D]`."""
        (H, W), (h, w) = self.layout.grid, self.layout.grids[0]
        if mask is None:
            return (frames if (h, w) == (H, W) else grid_pool(frames, (h, w))).flatten(1)
        maps = self.layout.packed_maps.to(frames.device, torch.promote_types(frames.dtype, torch.float32))
        rows, columns = maps[: h * H].view(h, H), maps[h * H : h * H + w * W].view(w, W)
        held = torch.einsum("ih,jw,shw->sij", rows, columns, mask.to(rows.dtype))[..., None]
        summed = torch.einsum("ih,jw,shwd->sijd", rows, columns, torch.where(mask[..., None], frames.to(rows.dtype), 0))
        return torch.where(held > 0, summed / held.clamp_min(1e-30), 0).to(frames.dtype).flatten(1)
