"""Column sums of an attention map, without storing the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_floating, check_same, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import attention_column_sums as _reference

_BACKENDS = Backends("attention_column_sums")


def _fake(query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    streams, queries, heads, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = query.new_empty((streams, heads, key.shape[1]), dtype=wide)
    return sums, query.new_empty((2, streams, heads, queries), dtype=wide)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, stats: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(key.shape)


# returns the sums, and [2, S, G, N]: each query's largest score and its sum of exp(score - largest)
_forward = Op("attention_column_sums", "(Tensor query, Tensor key, bool causal) -> (Tensor, Tensor)", _fake)
_backward = Op(
    "attention_column_sums_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor stats, bool causal) -> (Tensor, Tensor)",
    _fake_backward,
)


class _AttentionColumnSums(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, causal: bool, impl: str) -> Tensor:
        sums, stats = _forward(impl, query, key, causal)
        ctx.save_for_backward(query, key, stats)
        ctx.causal, ctx.impl = causal, impl
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_query, to_key = _backward(ctx.impl, grad, *ctx.saved_tensors, ctx.causal)
        for_query, for_key = ctx.needs_input_grad[:2]
        return to_query if for_query else None, to_key if for_key else None, None, None


@with_backends(_BACKENDS)
def attention_column_sums(
    query: Tensor, key: Tensor, *, causal: bool = False, per_head: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Sum the attention that each key receives from all queries: column sums of softmax(q · k / √E).

    The map is never stored. It is computed twice, block by block: first for the largest score and the sum of each
    query, then for the columns. The workspace is linear in N and M. For the mean over heads and queries, which token
    pruning uses, divide by G · N.

    Args:
        query: `[S, N, G, E]`, E at least 1, float64, float32, float16 or bfloat16, any strides; other sizes may be 0.
        key: `[S, M, G, E]`, same dtype and device; N and M may differ.
        causal: Query i sees keys up to i + M − N (the last query sees all). A query that sees no key adds nothing.
        per_head: Return one sum per head instead of their total.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[S, M]`, or `[S, G, M]` with `per_head`; float32, float64 for float64. Differentiable once in query and key.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes, dtypes or devices do not fit.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: FastV (arXiv 2403.06764) and VisionZip (arXiv 2412.04467) rank visual tokens by this score; the two passes
    use the largest score and the sum of a query as FlashAttention-2 does (arXiv 2307.08691).
    """
    check_tensor("query", query, "[S, N, G, E]")
    check_tensor("key", key, "[S, M, G, E]")
    check_floating("query", query)
    for name, flag in (("causal", causal), ("per_head", per_head)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    S, _, G, E = query.shape
    if E < 1:
        raise ValueError(f"query: expected at least 1 channel a head [S, N, G, E], got shape {shape_of(query)}")
    if (key.shape[0], *key.shape[2:]) != (S, G, E):
        raise ValueError(f"key: expected [{S}, M, {G}, {E}] to fit query, got shape {shape_of(key)}")
    check_same("key", key, "query", query)
    picked = _BACKENDS.pick(query, impl)
    if picked == "reference":
        sums = _reference.attention_column_sums(query, key, causal)
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        sums = _AttentionColumnSums.apply(query, key, causal, picked)
    else:
        sums = _forward(picked, query, key, causal)[0]
    return sums if per_head else sums.sum(1)
