"""Cosine similarity of consecutive frames, or of their tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_choice, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import adjacent_similarity as _reference

_BACKENDS = Backends("adjacent_similarity")


def _fake(frames: Tensor, level: str) -> tuple[Tensor, Tensor, Tensor]:
    streams, steps, tokens, channels = frames.shape
    wide = torch.float64 if frames.dtype == torch.float64 else torch.float32
    compared = 1 if level == "frame" else tokens
    similarity = frames.new_empty((streams, torch.sym_max(steps - 1, 0), compared), dtype=wide)
    norm = frames.new_empty((streams, steps, compared), dtype=wide)
    mean = frames.new_empty((streams, steps if level == "frame" else 0, 1, channels), dtype=wide)
    return similarity, norm, mean


def _backward_fake(grad: Tensor, compared: Tensor, similarity: Tensor, norm: Tensor) -> Tensor:
    return compared.new_empty(compared.shape)


# returns similarity [S, T-1, n], norm [S, T, n] and mean [S, T, 1, D]; n = 1 with a mean, or n = N without
_forward = Op("adjacent_similarity", "(Tensor frames, str level) -> (Tensor, Tensor, Tensor)", _fake)
_backward = Op(
    "adjacent_similarity_backward",
    "(Tensor grad, Tensor compared, Tensor similarity, Tensor norm) -> Tensor",
    _backward_fake,
)


class _AdjacentSimilarity(Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, level: str, impl: str) -> Tensor:
        similarity, norm, mean = _forward(impl, frames, level)
        ctx.level, ctx.impl, ctx.tokens, ctx.dtype = level, impl, frames.shape[2], frames.dtype
        ctx.save_for_backward(mean if level == "frame" else frames, similarity, norm)
        return similarity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        compared, similarity, norm = ctx.saved_tensors
        grad_compared = _backward(ctx.impl, grad, compared, similarity, norm)
        if ctx.level == "token":
            return grad_compared, None, None
        # all cells of a frame have the same gradient, so a view avoids a copy of the input's size
        return (grad_compared / ctx.tokens).to(ctx.dtype).expand(-1, -1, ctx.tokens, -1), None, None


@with_backends(_BACKENDS)
def adjacent_similarity(frames: Tensor, level: Literal["frame", "token"] = "frame", *, impl: Impl = "auto") -> Tensor:
    """Return the cosine similarity of consecutive frames, or of their tokens, in one pass over the frames.

    Args:
        frames: `[S, T, N, D]`, N at least 1, float64, float32, float16 or bfloat16, any strides; S, T and D may be 0.
        level: `"frame"` compares the frames' means over N, `"token"` each token with the token at the same position of
            the previous frame.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[S, T-1]` or `[S, T-1, N]`, size 0 in the second dimension for T < 2; float32 (float64 for float64). Entry t
        compares frames t and t + 1: dot / (max(|a|, 1e-8) · max(|b|, 1e-8)), accumulated in float32 or better. A zero
        vector gives 0, a NaN gives NaN. Differentiable once.

    Raises:
        TypeError: `frames` is not a tensor.
        ValueError: Unsupported dtype, shape or level.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: the frame level is the eviction score of VideoChat-Online (CVPR 2025), section 3.2; the token level the
    score of MA-LMM (CVPR 2024), section 3.2.
    """
    check_choice("level", level, ("frame", "token"))
    check_tensor("frames", frames, "[S, T, N, D]", floating=True)
    if frames.shape[2] < 1:
        raise ValueError(f"frames: expected at least 1 token a frame [S, T, N, D], got shape {shape_of(frames)}")
    picked = _BACKENDS.pick(frames, impl)
    if picked == "reference":
        return _reference.adjacent_similarity(frames, level)
    if torch.is_grad_enabled() and frames.requires_grad:
        similarity = _AdjacentSimilarity.apply(frames, level, picked)
    else:
        similarity = _forward(picked, frames, level)[0]
    return similarity.squeeze(2) if level == "frame" else similarity
