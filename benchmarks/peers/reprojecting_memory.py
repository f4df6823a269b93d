"""A dual memory that keeps features and projects all of them to keys and values again for every frame.

Source: the read of Algorithm 1 in VLM² (arXiv 2511.20644), working and episodic, with `nn.MultiheadAttention` over the
stored features, as ports of it are written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReprojectingMemory(nn.Module):
    """`forward(frame [S, N, D], working [S, L, n, D], episodic [S, M, n, D])`: what each answers, `[S, N, D]`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.working = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.episodic = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, frame: Tensor, working: Tensor, episodic: Tensor) -> tuple[Tensor, Tensor]:
        answers = []
        for attention, slots in ((self.working, working), (self.episodic, episodic)):
            features = slots.flatten(1, 2)
            answers.append(attention(frame, features, features, need_weights=False)[0])
        return answers[0], answers[1]

    @torch.no_grad()
    def keys_and_values(self, name: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """What one of the two attentions makes of features `[..., D]`: `[..., heads, D / heads]` each."""
        attention: nn.MultiheadAttention = getattr(self, name)
        projected = nn.functional.linear(features, attention.in_proj_weight, attention.in_proj_bias)
        return tuple(x.unflatten(-1, (attention.num_heads, -1)) for x in projected.chunk(3, -1)[1:])  # type: ignore[return-value]
