"""Cosine similarity of consecutive frames, or of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def adjacent_similarity(frames: Tensor, level: str = "frame") -> Tensor:
    """Return `[S, T-1]` (means over N) or `[S, T-1, N]` for `frames [S, T, N, D]`; float32, or float64 for float64.

    A norm below 1e-8 counts as 1e-8, so a zero vector has similarity 0; NaN gives NaN.
    """
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    vectors = wide.mean(2) if level == "frame" else wide
    norm = torch.linalg.vector_norm(vectors, dim=-1).clamp_min(EPS)
    products = (vectors[:, 1:] * vectors[:, :-1]).sum(-1)
    return products / (norm[:, 1:] * norm[:, :-1])
