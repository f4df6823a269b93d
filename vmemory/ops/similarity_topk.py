"""Exact search: the k memory slots most similar to each query, without a score matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import (
    check_choice,
    check_device,
    check_floating,
    check_int,
    check_same,
    check_tensor,
    shape_of,
)
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import similarity_topk as _reference

_BACKENDS = Backends("similarity_topk", triton=False)
MAX_K = 1024


class TopK(NamedTuple):
    """values `[S, Q, k]`, largest first, and indices `[S, Q, k]` int64; −inf and −1 where nothing is left."""

    values: Tensor
    indices: Tensor


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake(
    query: Tensor, memory: Tensor, count: Tensor | None, where: Tensor | None, scale: Tensor | None, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], k)
    return query.new_empty(shape, dtype=_wide(query)), query.new_empty(shape, dtype=torch.int64)


def _fake_backward(
    grad: Tensor, values: Tensor, indices: Tensor, query: Tensor, memory: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), memory.new_empty(memory.shape)


_forward = Op(
    "similarity_topk",
    "(Tensor query, Tensor memory, Tensor? count, Tensor? where, Tensor? scale, int k, str metric) -> (Tensor, Tensor)",
    _fake,
)
_backward = Op(
    "similarity_topk_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor query, Tensor memory, str metric) -> (Tensor, Tensor)",
    _fake_backward,
)


class _SimilarityTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        count: Tensor | None,
        where: Tensor | None,
        k: int,
        metric: str,
        picked: str,
    ) -> tuple[Tensor, Tensor]:
        values, indices = _forward(picked, query, memory, count, where, None, k, metric)
        ctx.save_for_backward(values, indices, query, memory)
        ctx.metric, ctx.picked = metric, picked
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, query, memory = ctx.saved_tensors
        to_query, to_memory = _backward(ctx.picked, grad, values, indices, query, memory, ctx.metric)
        return to_query, to_memory, None, None, None, None, None


@with_backends(_BACKENDS)
def similarity_topk(
    query: Tensor,
    memory: Tensor,
    k: int,
    *,
    count: Tensor | None = None,
    metric: str = "cosine",
    where: Tensor | None = None,
    scale: Tensor | None = None,
    impl: Impl = "auto",
) -> TopK:
    """Find the k slots most similar to each query by an exact scan that never stores the score matrix.

    Scores are summed in float32 (float64 for float64), in one order for every row: equal rows score equally wherever
    they lie, and of equal scores the lower slot comes first. A NaN score sorts as the largest.

    Args:
        query: `[S, Q, D]`, float64, float32, float16 or bfloat16.
        memory: `[S, M, D]`, the dtype of `query`, or int8 with `scale`; the device of `query`.
        k: Slots per query, 1 to 1024; may exceed M.
        count: `[S]` int64 on the device: items ever written; only the first `min(count, M)` slots are searched.
        metric: `"cosine"`, dot / (max(‖a‖, 1e-8) · max(‖b‖, 1e-8)), or `"dot"`.
        where: `[S, M]` bool, True = searchable.
        scale: `[S, M]` float32, row = int8 values · scale.
        impl: Which implementation to run.

    Returns:
        `TopK(values, indices)`. Values are float32 (float64 for float64). Gradients reach `query` and `memory` through
        the values; not with int8.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes, dtypes or devices do not fit, or k is out of range.
    """
    check_tensor("query", query, "[S, Q, D]")
    check_tensor("memory", memory, "[S, M, D]")
    check_floating("query", query)
    check_int("k", k, low=1, high=MAX_K)
    check_choice("metric", metric, ("cosine", "dot"))
    S, M, D = memory.shape
    if query.shape[0] != S or query.shape[2] != D:
        raise ValueError(f"query: expected [{S}, Q, {D}] to fit memory {shape_of(memory)}, got shape {shape_of(query)}")
    if (memory.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"scale: expected one with int8 memory and only then, memory is {memory.dtype}")
    if memory.dtype == torch.int8:
        check_device("memory", memory, "query", query)
    else:
        check_same("memory", memory, "query", query)
    for name, x, want, kind in (
        ("count", count, (S,), torch.int64),
        ("where", where, (S, M), torch.bool),
        ("scale", scale, (S, M), torch.float32),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.shape != want or x.dtype != kind:
            raise ValueError(f"{name}: expected {kind} of shape {list(want)}, got {x.dtype} of shape {shape_of(x)}")
        check_device(name, x, "query", query)
    picked = _BACKENDS.pick(query, impl)
    if picked == "reference":
        return TopK(*_reference.similarity_topk(query, memory, k, count, where, metric, scale))
    if scale is None and torch.is_grad_enabled() and (query.requires_grad or memory.requires_grad):
        return TopK(*_SimilarityTopK.apply(query, memory, count, where, k, metric, picked))
    return TopK(*_forward(picked, query, memory, count, where, scale, k, metric))
