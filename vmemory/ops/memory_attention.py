"""Attention over the valid slots of a memory, with work proportional to the number of valid slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_device, check_floating, check_same, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import memory_attention as _reference

_BACKENDS = Backends("memory_attention")


def _fake(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    streams, tokens, heads, _ = query.shape
    accumulated = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(query.shape, dtype=accumulated if wide else query.dtype)
    return out, query.new_empty((2, streams, heads, tokens), dtype=accumulated)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    out: Tensor,
    stats: Tensor,
    for_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = keys.shape if for_memory else (0,)
    return query.new_empty(query.shape), query.new_empty(shape), query.new_empty(shape)


# Returns the output, and [2, S, G, N]: the largest score and the sum of exp(score - largest), separately, because
# their combination in one number loses precision. `wide` returns the output in the dtype of accumulation: gradients of
# scores are small differences from the output, which 16 bits would destroy.
_forward = Op(
    "memory_attention",
    "(Tensor query, Tensor keys, Tensor values, Tensor count, Tensor? key_scale, Tensor? value_scale,"
    " bool wide) -> (Tensor, Tensor)",
    _fake,
)
# gradients of keys and values that are not required are empty tensors
_backward = Op(
    "memory_attention_backward",
    "(Tensor grad, Tensor query, Tensor keys, Tensor values, Tensor count, Tensor? key_scale, Tensor? value_scale,"
    " Tensor out, Tensor stats, bool for_memory) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _MemoryAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        count: Tensor,
        key_scale: Tensor | None,
        value_scale: Tensor | None,
        impl: str,
    ) -> Tensor:
        inputs = query, keys, values, count, key_scale, value_scale
        out, stats = _forward(impl, *inputs, True)
        ctx.save_for_backward(*inputs, out, stats)
        ctx.impl = impl
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_query, for_keys, for_values = ctx.needs_input_grad[:3]
        to_query, to_keys, to_values = _backward(ctx.impl, grad, *ctx.saved_tensors, for_keys or for_values)
        return (
            to_query if for_query else None,
            to_keys if for_keys else None,
            to_values if for_values else None,
            *(None,) * 4,
        )


@with_backends(_BACKENDS)
def memory_attention(
    query: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    count: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend from tokens to the valid slots of a memory, without reading the other slots.

    Args:
        query: `[S, N, G, E]`, E at least 1, float64, float32, float16 or bfloat16, any strides; other sizes may be 0.
        key_slots: `[S, M, n, G, E]`: M slots of n tokens, same dtype and device as `query`; or, with scales, as
            `quantize_slots` stores them: int8, or 4 bits in uint8 `[S, M, n, G, ceil(E / 2)]`.
        value_slots: Shape, dtype and device of `key_slots`.
        count: `[S]` int64 on the device, the number of items ever written: the first `min(count, M)` slots are valid,
            none if it is negative.
        key_scale: `[S, M, n, G]` float32, required for quantised slots only: a row is its values times its scale.
        value_scale: The same for `value_slots`.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[S, N, G, E]`, the dtype of `query`, softmax(q · k / √E) · v over the valid slots of the stream, without a
        causal mask, accumulated in float32 or better (on a GPU weights and quantised values are rounded to the dtype of
        `query`). A stream without a valid slot gets zeros. The content of invalid slots has no influence.
        Differentiable once in query and in floating keys and values. The weights are never stored: the backward pass
        recomputes them. Invalid slots get zero gradients.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Shapes, dtypes or devices do not fit.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: Eq. 5 of VLM² (arXiv 2511.20644) with keys and values projected once, when a slot is written; blocks with an
    online softmax as in FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
    check_tensor("query", query, "[S, N, G, E]")
    check_tensor("key_slots", key_slots, "[S, M, n, G, E]")
    check_tensor("value_slots", value_slots, "[S, M, n, G, E]")
    check_tensor("count", count, "[S]")
    check_floating("query", query)
    S, _, G, E = query.shape
    if E < 1:
        raise ValueError(f"query: expected at least 1 channel a head [S, N, G, E], got shape {shape_of(query)}")
    quantized = key_slots.dtype in (torch.int8, torch.uint8)
    stored = (E + 1) // 2 if key_slots.dtype == torch.uint8 else E
    if (key_slots.shape[0], *key_slots.shape[3:]) != (S, G, stored):
        raise ValueError(
            f"key_slots: expected [{S}, M, n, {G}, {stored}] to fit query, got shape {shape_of(key_slots)}"
        )
    if value_slots.shape != key_slots.shape:
        raise ValueError(f"value_slots: expected key_slots' {shape_of(key_slots)}, got shape {shape_of(value_slots)}")
    if quantized:
        check_device("key_slots", key_slots, "query", query)
        check_same("value_slots", value_slots, "key_slots", key_slots)
    else:
        check_same("key_slots", key_slots, "query", query)
        check_same("value_slots", value_slots, "query", query)
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if quantized != (scale is not None):
            raise ValueError(f"{name}: expected one with int8 or uint8 slots and only then, they are {key_slots.dtype}")
        if scale is None:
            continue
        check_tensor(name, scale, "[S, M, n, G]")
        if scale.shape != key_slots.shape[:-1] or scale.dtype != torch.float32:
            wanted = shape_of(key_slots[..., 0])
            raise ValueError(
                f"{name}: expected float32 of shape {wanted}, got {scale.dtype} of shape {shape_of(scale)}"
            )
        check_device(name, scale, "query", query)
    if count.shape != (S,) or count.dtype != torch.int64:
        raise ValueError(f"count: expected torch.int64 of shape [{S}], got {count.dtype} of shape {shape_of(count)}")
    check_device("count", count, "query", query)
    picked = _BACKENDS.pick(query, impl)
    inputs = query, key_slots, value_slots, count, key_scale, value_scale
    if picked == "reference":
        return _reference.memory_attention(*inputs)
    if torch.is_grad_enabled() and (query.requires_grad or key_slots.requires_grad or value_slots.requires_grad):
        return _MemoryAttention.apply(*inputs, picked)
    return _forward(picked, *inputs, False)[0]
