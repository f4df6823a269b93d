"""Exact search for the k memory slots most similar to each query, without storing a score matrix."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import (
    check_choice,
    check_device,
    check_int,
    check_same,
    check_tensor,
    shape_of,
)
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import similarity_topk as _reference

MAX_K = 1024

_MANY_QUERIES = 8


def _passed_over(impl: str, query: Tensor) -> str:
    # the CUDA kernel reads the memory once for every 8 queries and multiplies without tensor cores
    if impl == "native" and query.is_cuda and query.shape[1] > _MANY_QUERIES:
        return f"more than {_MANY_QUERIES} queries are a matrix product, which the Triton kernel does better"
    return ""


_BACKENDS = Backends(
    "similarity_topk",
    cuda=True,
    cuda_dtypes=(torch.float32, torch.float16, torch.bfloat16),
    passed_over=_passed_over,
)
_IN_4_BITS = replace(_BACKENDS, cuda=False)
_BACKWARD = Backends("similarity_topk_backward")


class TopK(NamedTuple):
    """Values `[S, Q, k]`, largest first, and indices `[S, Q, k]` int64; −inf and −1 if fewer than k slots exist."""

    values: Tensor
    indices: Tensor


def _wide(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake(
    query: Tensor,
    memory: Tensor,
    count: Tensor | None,
    where: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], k)
    return query.new_empty(shape, dtype=_wide(query)), query.new_empty(shape, dtype=torch.int64)


def _fake_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    query: Tensor,
    memory: Tensor,
    scale: Tensor | None,
    metric: str,
    for_query: bool,
    for_memory: bool,
) -> tuple[Tensor, Tensor]:
    to_query = query.new_empty(query.shape if for_query else (0,))
    return to_query, query.new_empty(memory.shape if for_memory else (0,))


_forward = Op(
    "similarity_topk",
    "(Tensor query, Tensor memory, Tensor? count, Tensor? where, Tensor? scale, Tensor? norm, int k, str metric)"
    " -> (Tensor, Tensor)",
    _fake,
)
# a gradient that is not required is an empty tensor
_backward = Op(
    "similarity_topk_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor query, Tensor memory, Tensor? scale, str metric,"
    " bool for_query, bool for_memory) -> (Tensor, Tensor)",
    _fake_backward,
)


class _SimilarityTopK(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        count: Tensor | None,
        where: Tensor | None,
        scale: Tensor | None,
        norm: Tensor | None,
        k: int,
        metric: str,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        values, indices = _forward(impl, query, memory, count, where, scale, norm, k, metric)
        ctx.save_for_backward(values, indices, query, memory, scale)
        ctx.metric = metric
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, query, memory, scale = ctx.saved_tensors
        for_query, for_memory = ctx.needs_input_grad[:2]
        arguments = grad, values, indices, query, memory, scale, ctx.metric, for_query, for_memory
        picked = _BACKWARD.pick(query)
        run = _reference.similarity_topk_backward if picked == "reference" else partial(_backward, picked)
        to_query, to_memory = run(*arguments)
        return to_query if for_query else None, to_memory if for_memory else None, *(None,) * 7


@with_backends(_BACKENDS, {torch.uint8: _IN_4_BITS})
def similarity_topk(
    query: Tensor,
    memory: Tensor,
    k: int,
    *,
    count: Tensor | None = None,
    metric: Literal["cosine", "dot"] = "cosine",
    where: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    impl: Impl = "auto",
) -> TopK:
    """Find the k slots of a memory that are most similar to each query, exactly and without storing a score matrix.

    Args:
        query: `[S, Q, D]`, float64, float32, float16 or bfloat16, any strides; S, Q, M and D may be 0.
        memory: `[S, M, D]`, fewer than 2³¹ slots, the dtype of `query`, or with `scale` as `quantize_slots` stores it:
            int8, or 4 bits in uint8 `[S, M, ceil(D / 2)]`; the device of `query`. A contiguous memory is not copied: on
            the CPU it may be a memory-mapped file larger than the machine's memory.
        k: Slots per query, 1 to 1024; may exceed M.
        count: `[S]` int64 on the device, the number of items ever written: only the first `min(count, M)` slots are
            searched.
        metric: `"cosine"`: dot / (max(|a|, 1e-8) · max(|b|, 1e-8)); `"dot"`: the dot product.
        where: `[S, M]` bool, True = searchable. With `count`, a slot must pass both. For a range of time pass
            `(time >= since) & (time < until)`; the CPU does not read the excluded rows. A slot whose time is NaN is in
            no range.
        scale: `[S, M]` float32: a row is its int8 or 4-bit values times its scale.
        norm: `[S, M]`, the dtype of the values: Euclidean norms of the rows (scale included), if the caller stores
            them. A cosine on the CPU then costs as much as a dot product. The norms are not checked. A GPU is bound by
            reading the rows and computes its own norms.
        impl: Which implementation to run; `"auto"` picks by device, dtype and, on a GPU, the number of queries. Memory
            in 4 bits has no native kernel there.

    Returns:
        `TopK(values [S, Q, k], indices [S, Q, k])`, best first; values float32 (float64 for a float64 query), indices
        int64. Of equal scores the lower slot comes first, and a NaN score is the largest, as in `torch.topk`. If fewer
        than k slots are searched, the rest is −inf and −1. Scores are summed in float32 or better, in the same order
        for every row: equal rows have bit-identical scores. On the CPU this order does not depend on the number of
        queries either. The content of slots that are not searched has no influence.
        Differentiable once in `query` and a floating `memory`, through the values; not in `scale`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes, dtypes or devices do not fit, or k is out of range.
        RuntimeError: `impl` names an implementation that cannot run here.
    """
    check_tensor("query", query, "[S, Q, D]", floating=True)
    check_tensor("memory", memory, "[S, M, D]")
    check_int("k", k, low=1, high=MAX_K)
    check_choice("metric", metric, ("cosine", "dot"))
    S, M, D = memory.shape
    if M >= 2**31:
        raise ValueError(f"memory: expected fewer than 2**31 slots [S, M, D], got shape {shape_of(memory)}")
    channels = query.shape[2]
    in_4_bits = memory.dtype == torch.uint8
    if query.shape[0] != S or ((channels + 1) // 2 if in_4_bits else channels) != D:
        wanted = f"{2 * D - 1} or {2 * D}" if in_4_bits else D
        raise ValueError(f"query: expected [{S}, Q, {wanted}] to fit memory {shape_of(memory)}, got {shape_of(query)}")
    quantized = in_4_bits or memory.dtype == torch.int8
    if quantized != (scale is not None):
        raise ValueError(f"scale: expected one with int8 or uint8 memory and only then, memory is {memory.dtype}")
    if quantized:
        check_device("memory", memory, "query", query)
    else:
        check_same("memory", memory, "query", query)
    for name, x, want, kind in (
        ("count", count, (S,), torch.int64),
        ("where", where, (S, M), torch.bool),
        ("scale", scale, (S, M), torch.float32),
        ("norm", norm, (S, M), _wide(query)),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.shape != want or x.dtype != kind:
            raise ValueError(f"{name}: expected {kind} of shape {list(want)}, got {x.dtype} of shape {shape_of(x)}")
        check_device(name, x, "query", query)
    return topk_checked(query, memory, k, count, metric, where, scale, norm, impl)


def topk_checked(
    query: Tensor,
    memory: Tensor,
    k: int,
    count: Tensor | None = None,
    metric: str = "cosine",
    where: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    impl: Impl = "auto",
) -> TopK:
    """Run `similarity_topk` on arguments that are known to fit."""
    picked = (_IN_4_BITS if memory.dtype == torch.uint8 else _BACKENDS).pick(query, impl)
    if picked == "reference":
        return TopK(*_reference.similarity_topk(query, memory, k, count, where, metric, scale, norm))
    if torch.is_grad_enabled() and (query.requires_grad or memory.requires_grad):
        return TopK(*_SimilarityTopK.apply(query, memory, count, where, scale, norm, k, metric, picked))
    return TopK(*_forward(picked, query, memory, count, where, scale, norm, k, metric))
