"""Token selection as it is written with PyTorch's own operators: topk, sort and gather.

`by_frame` is the loop over frames of VidCom2, without its read-back of the budgets; the whole-clip
form is EVS's (vLLM, `evs.py`) with a partial selection instead of its full argsort.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores: Tensor, budget: int) -> Tensor:
    """Indices `[S, budget]`, ascending; of equal scores any."""
    return scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values


def by_frame(scores: Tensor, frames: int, budget: int) -> Tensor:
    """`budget` tokens of each of `frames` equally long frames: indices `[S, frames * budget]`, ascending."""
    kept, first = [], 0
    for frame in scores.chunk(frames, dim=-1):
        kept.append(select(frame, budget) + first)
        first += frame.shape[-1]
    return torch.cat(kept, -1)


def gather(tokens: Tensor, keep: Tensor) -> Tensor:
    """Rows `keep [S, K]` of `tokens [S, N, D]`, all of them there."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
