"""A dual memory that stores features and projects all of them to keys and values for every frame.

Written from Algorithm 1 of VLM² (arXiv 2511.20644), with `nn.MultiheadAttention` over the stored features, as ports of
it are written; slots are tensors and nothing is decided on the host, which is the best eager form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.list_memory import replace_


class ReprojectingMemory(nn.Module):
    """Full slots `working [L, N, D]` and `episodic [M, N, D]` of one stream, and the weights that read them."""

    def __init__(self, dim: int, heads: int, working: Tensor, episodic: Tensor) -> None:
        super().__init__()
        kind = {"device": working.device, "dtype": working.dtype}
        self.working_attention = nn.MultiheadAttention(dim, heads, batch_first=True, **kind)
        self.episodic_attention = nn.MultiheadAttention(dim, heads, batch_first=True, **kind)
        self.gate = nn.Sequential(nn.Linear(2 * dim, dim, **kind), nn.ReLU(), nn.Linear(dim, dim, **kind), nn.Sigmoid())
        self.register_buffer("working", working.clone())
        self.register_buffer("episodic", episodic.clone())
        self.register_buffer("oldest", torch.zeros(1, dtype=torch.int64, device=working.device))

    def read(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reading of each memory for a frame `[N, D]`."""
        answers = []
        for attention, slots in (
            (self.working_attention, self.working),
            (self.episodic_attention, self.episodic),
        ):
            features = slots.flatten(0, 1)[None]
            answers.append(attention(frame[None], features, features, need_weights=False)[0][0])
        return answers[0], answers[1]

    @torch.no_grad()
    def push(self, frame: Tensor) -> Tensor:
        """Return M_t `[N, D]` of a frame, then store the frame and M_t in their memories."""
        working, episodic = self.read(frame)
        gate = self.gate(torch.cat([working, episodic], -1))
        fused = gate * working + (1 - gate) * episodic
        self.working.index_copy_(0, self.oldest, frame[None])
        self.oldest.copy_((self.oldest + 1) % len(self.working))
        replace_(self.episodic, fused, "flat")
        return fused
