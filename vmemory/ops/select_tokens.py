"""Select the tokens with the largest scores, and gather the rows, positions and times that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_device, check_floating, check_int, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import select_tokens as _reference

_SELECT = Backends("select_tokens", cuda=True)
_COMPACT = Backends("compact")
_STEM = "select_tokens"
MAX_SEGMENTS = 4096
_COMPANIONS = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)


class Selection(NamedTuple):
    """Indices `[S, sum of budgets]` int64, ascending, then −1; count `[S]` int64, the number of valid indices."""

    indices: Tensor
    count: Tensor  # type: ignore[assignment]


class Compacted(NamedTuple):
    """Tokens `[S, K, ...]` and the companions, each `[S, K, ...]`, in their given order."""

    tokens: Tensor
    companions: tuple[Tensor, ...]


def _fake_select(scores: Tensor, budgets: list[int], segments: Tensor | None) -> tuple[Tensor, Tensor]:
    streams = scores.shape[0]
    return (
        scores.new_empty((streams, sum(budgets)), dtype=torch.int64),
        scores.new_empty((streams,), dtype=torch.int64),
    )


def _fake_compact(rows: list[Tensor], keep: Tensor) -> list[Tensor]:
    return [x.new_empty((*keep.shape, *x.shape[2:])) for x in rows]


def _fake_compact_backward(grad: Tensor, keep: Tensor, length: int) -> Tensor:
    return grad.new_empty((grad.shape[0], length, *grad.shape[2:]))


_select = Op(
    "select_tokens", "(Tensor scores, int[] budgets, Tensor? segments) -> (Tensor, Tensor)", _fake_select, stem=_STEM
)
# the first tensor is padded with 0, the others with -1
_compact = Op("compact", "(Tensor[] rows, Tensor keep) -> Tensor[]", _fake_compact, stem=_STEM)
_compact_backward = Op(
    "compact_backward", "(Tensor grad, Tensor keep, SymInt length) -> Tensor", _fake_compact_backward, stem=_STEM
)


@with_backends(_SELECT)
def select_tokens(
    scores: Tensor, budget: int | Sequence[int], segments: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor | Selection:
    """Select the tokens with the largest scores, of the whole clip or of each segment, without host synchronisation.

    Of equal scores (0 and −0 are equal) the token with the lower index is kept; NaN is the largest score of all, as in
    `torch.topk`. The indices have no gradient.

    Args:
        scores: `[S, N]`, float64, float32, float16 or bfloat16, any strides.
        budget: Tokens to keep, 0 to N; with `segments` a list of ints, one per segment, at most 4096, any size.
        segments: `[S, N]` or `[N]` int64 on the device: the segment of each token, e.g. its frame, in any order. A
            token whose segment is outside `range(len(budget))` is never kept.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        Indices `[S, budget]` int64, ascending. With `segments` a `Selection(indices, count)`: the indices of all
        segments together, ascending, padded with −1 to the sum of budgets. A segment smaller than its budget is kept
        whole.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype, device or budget.
        RuntimeError: `impl` names an implementation that cannot run here.
    """
    check_tensor("scores", scores, "[S, N]", floating=True)
    S, N = scores.shape
    if segments is None:
        check_int("budget", budget, low=0, high=N)
        budgets = [cast(int, budget)]
    else:
        if not isinstance(budget, (list, tuple)):
            raise TypeError(f"budget: expected a list of ints with segments, got {type(budget).__name__}")
        if len(budget) > MAX_SEGMENTS:
            raise ValueError(f"budget: expected at most {MAX_SEGMENTS} segments, got {len(budget)}")
        for i, size in enumerate(budget):
            check_int(f"budget[{i}]", size, low=0)
        budgets = list(budget)
        if not isinstance(segments, Tensor):
            raise TypeError(f"segments: expected a tensor [S, N] or [N], got {type(segments).__name__}")
        if segments.dtype != torch.int64:
            raise ValueError(f"segments: expected int64, got {segments.dtype}")
        if segments.dim() not in (1, 2) or segments.shape != scores.shape[2 - segments.dim() :]:
            raise ValueError(f"segments: expected [{S}, {N}] or [{N}], got shape {shape_of(segments)}")
        check_device("segments", segments, "scores", scores)
    picked = _SELECT.pick(scores, impl)
    if picked == "reference":
        chosen = Selection(*_reference.select_tokens(scores.detach(), budgets, segments))
    else:
        chosen = Selection(*_select(picked, scores.detach(), budgets, segments))
    return chosen.indices if segments is None else chosen


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor, picked: str, *rows: Tensor) -> tuple[Tensor, ...]:
        moved = tuple(_compact(picked, list(rows), keep))
        ctx.save_for_backward(keep)
        ctx.picked, ctx.lengths = picked, [x.shape[1] for x in rows]
        ctx.mark_non_differentiable(*[x for x in moved if not x.is_floating_point()])
        return moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        back: list[Tensor | None] = [None, None]
        for grad, length, needed in zip(grads, ctx.lengths, ctx.needs_input_grad[2:], strict=True):
            back.append(_compact_backward(ctx.picked, grad, keep, length) if needed else None)
        return tuple(back)


@with_backends(_COMPACT)
def compact(tokens: Tensor, keep: Tensor, *companions: Tensor, impl: Impl = "auto") -> Compacted:
    """Gather selected tokens and their companions, such as positions, times and frame numbers.

    Args:
        tokens: `[S, N, ...]`, float64, float32, float16 or bfloat16, any strides.
        keep: `[S, K]` int64 on the device, as `select_tokens` returns it: the rows in output order; rows may repeat. A
            value outside `range(N)`, by convention −1, is padding. A mask is refused, because its size would have to be
            read from the device.
        companions: Tensors `[S, N, ...]` that are gathered alike: a floating dtype, int8 to int64 or bool.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `Compacted(tokens, companions)`. A padding row is 0 in the tokens and −1 (False for bool) in the companions.
        Gradients reach tokens and floating companions; repeated rows get the sum.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype or device.
        RuntimeError: `impl` names an implementation that cannot run here.
    """
    rows = [tokens, *companions]
    for i, x in enumerate(rows):
        name = f"companions[{i - 1}]" if i else "tokens"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor [S, N, ...], got {type(x).__name__}")
        if x.dim() < 2 or x.shape[:2] != tokens.shape[:2]:
            want = "[S, N, ...]" if i == 0 else f"[{tokens.shape[0]}, {tokens.shape[1]}, ...]"
            raise ValueError(f"{name}: expected a tensor {want}, got shape {shape_of(x)}")
        if i == 0 or x.dtype not in _COMPANIONS:
            check_floating(name, x)
        check_device(name, x, "tokens", tokens)
    check_tensor("keep", keep, "[S, K]")
    if keep.dtype != torch.int64:
        raise ValueError(f"keep: expected int64 indices, as select_tokens returns them, got {keep.dtype}")
    if keep.shape[0] != tokens.shape[0]:
        raise ValueError(f"keep: expected {tokens.shape[0]} streams, got shape {shape_of(keep)}")
    check_device("keep", keep, "tokens", tokens)
    picked = _COMPACT.pick(tokens, impl)
    if picked == "reference":
        moved = _reference.compact(rows, keep)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in rows):
        moved = list(_Compact.apply(keep, picked, *rows))
    else:
        moved = _compact(picked, rows, keep)
    return Compacted(moved[0], tuple(moved[1:]))
