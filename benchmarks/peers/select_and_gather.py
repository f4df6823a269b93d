"""Token selection with PyTorch's own operators: topk, sort and gather.

`by_frame` is the loop over frames of VidCom2, without its read-back of the budgets; the whole-clip
form is EVS's (vLLM, `evs.py`) with a partial selection instead of its full argsort.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores: Tensor, budget: int) -> Tensor:
    """Return indices `[S, budget]`, ascending; ties are broken arbitrarily."""
    return scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values


def by_frame(scores: Tensor, frames: int, budget: int) -> Tensor:
    """Return indices `[S, frames * budget]`, ascending: `budget` tokens of each of `frames` equal frames."""
    kept, first = [], 0
    for frame in scores.chunk(frames, dim=-1):
        kept.append(select(frame, budget) + first)
        first += frame.shape[-1]
    return torch.cat(kept, -1)


def gather(tokens: Tensor, keep: Tensor) -> Tensor:
    """Gather existing rows `keep [S, K]` of `tokens [S, N, D]`."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
