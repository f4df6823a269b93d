"""Merge the most similar pair of temporal neighbours, which frees one entry of a memory."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_choice, check_device, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import adjacent_merge as _reference

_BACKENDS = Backends("adjacent_merge")


class MergedBank(NamedTuple):
    """Merged bank `[S, T-1, N, D]`, size `[S, T-1, N]`; place `[S, 1]` or `[S, N]` int64, the merged pair's first."""

    bank: Tensor
    size: Tensor
    place: Tensor


def _fake(bank: Tensor, size: Tensor, level: str) -> tuple[Tensor, Tensor, Tensor]:
    streams, entries, tokens, channels = bank.shape
    return (
        bank.new_empty((streams, entries - 1, tokens, channels)),
        size.new_empty((streams, entries - 1, tokens)),
        bank.new_empty((streams, 1 if level == "frame" else tokens), dtype=torch.int64),
    )


def _backward_fake(grad: Tensor, size: Tensor, place: Tensor) -> Tensor:
    streams, entries, tokens, channels = grad.shape
    return grad.new_empty((streams, entries + 1, tokens, channels))


_forward = Op("adjacent_merge", "(Tensor bank, Tensor size, str level) -> (Tensor, Tensor, Tensor)", _fake)
_backward = Op("adjacent_merge_backward", "(Tensor grad, Tensor size, Tensor place) -> Tensor", _backward_fake)


class _AdjacentMerge(Function):
    @staticmethod
    def forward(ctx: Any, bank: Tensor, size: Tensor, level: str, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        merged, sizes, place = _forward(impl, bank, size, level)
        ctx.impl = impl
        ctx.save_for_backward(size, place)
        ctx.mark_non_differentiable(sizes, place)
        return merged, sizes, place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        size, place = ctx.saved_tensors
        return _backward(ctx.impl, grad, size, place), None, None, None


@with_backends(_BACKENDS)
def adjacent_merge(
    bank: Tensor, size: Tensor, level: Literal["frame", "token"] = "frame", *, impl: Impl = "auto"
) -> MergedBank:
    """Merge the most similar pair of temporal neighbours into their size-weighted mean.

    Args:
        bank: `[S, T, N, D]`, T at least 2, N at least 1, float64, float32, float16 or bfloat16, any strides.
        size: `[S, T, N]`, the number of original tokens in each token, not negative; float32 (float64 for float64).
        level: `"frame"`: each stream merges one pair of frames, by the cosine of their means over N. `"token"`: each
            patch position merges its own pair of tokens.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `MergedBank(bank [S, T-1, N, D], size [S, T-1, N], place)`, place `[S, 1]` or `[S, N]` int64. The temporal order
        is kept, and the sizes of the pair are added. The pair has the largest `adjacent_similarity`, the first of
        equals; NaN counts as the largest. Two tokens of size 0 have equal weights. Gradients reach `bank` through kept
        and merged tokens, not through the choice of the pair.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Unsupported dtype, shape, device or level.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: MA-LMM (CVPR 2024, arXiv 2404.05726) section 3.2 for `"token"`; MovieChat (CVPR 2024, arXiv 2307.16449)
    merges whole frames, by the mean of their tokens' dot products and without weights. `"frame"` compares the frames'
    means by cosine instead, as `adjacent_similarity` does, and uses weights.
    """
    check_choice("level", level, ("frame", "token"))
    check_tensor("bank", bank, "[S, T, N, D]", floating=True)
    check_tensor("size", size, "[S, T, N]")
    S, T, N, _ = bank.shape
    if T < 2:
        raise ValueError(f"bank: expected at least 2 entries [S, T, N, D], got shape {shape_of(bank)}")
    if N < 1:
        raise ValueError(f"bank: expected at least 1 token an entry [S, T, N, D], got shape {shape_of(bank)}")
    if size.shape != bank.shape[:3]:
        raise ValueError(f"size: expected [{S}, {T}, {N}], got shape {shape_of(size)}")
    wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
    if size.dtype != wide:
        raise ValueError(f"size: expected {wide}, got {size.dtype}")
    check_device("size", size, "bank", bank)
    picked = _BACKENDS.pick(bank, impl)
    size = size.detach()
    if picked == "reference":
        return MergedBank(*_reference.adjacent_merge(bank, size, level))
    if torch.is_grad_enabled() and bank.requires_grad:
        return MergedBank(*_AdjacentMerge.apply(bank, size, level, picked))
    return MergedBank(*_forward(picked, bank, size, level))
