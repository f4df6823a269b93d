"""A learned memory beside what the model was trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ResidualMemory(nn.Module):
    """Tokens plus a share of what a learned memory makes of them, from none: H + α · (M − H), α = 0 at first.

    A model with an untrained memory is the model itself, to the bit, and training decides how much it listens.

    Args:
        memory: With `transform(clip [T, H, W, D], time, valid=…)` giving one token for each of the clip's.

    Source: ReZero (arXiv 2003.04887).
    """

    # as many tokens as came
    one_to_one = True

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.memory = memory
        like = next(memory.parameters())
        # one element, not none: FSDP shards no scalars
        self.alpha = nn.Parameter(torch.zeros(1, device=like.device, dtype=like.dtype))

    def compress(self, clip: Tensor, time: Any = None, *, valid: Tensor | None = None) -> Any:
        """The memory's tokens, their provenance, and `tokens` as above; channels behind the memory's pass unchanged."""
        dim: int = self.memory.dim  # type: ignore[assignment]  # a module's attribute
        # under autocast features have another dtype than weights
        frames = clip[..., :dim].to(self.alpha.dtype).contiguous()
        with torch.autocast(clip.device.type, enabled=False):
            made = self.memory.transform(frames, time, valid=valid)  # type: ignore[operator]
        own = clip.flatten(0, 2)[made.source]
        head = own[:, :dim]
        # what is added is rounded, never the tokens themselves
        mixed = head + (self.alpha * (made.tokens - head)).to(head.dtype)
        return made._replace(tokens=torch.cat([mixed, own[:, dim:]], -1) if own.shape[1] > dim else mixed)
