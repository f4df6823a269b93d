"""Attention over the valid slots of a memory, in blocks with an online softmax.

The number of valid slots is read on the device. A program attends from a block of queries to its share of the valid
keys. If the queries alone do not fill the device, the keys are split and a second kernel combines the shares. The
backward pass computes the weights again from each query's largest score and sum. Quantised slots are widened on load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._attention import (
    NOTHING,
    blocks,
    head_of,
    key_shares,
    load_rows,
    load_scales,
    load_stats,
    soften,
    store_rows,
    store_stats,
)
from vmemory.kernels._launch import device_of, jit
from vmemory.kernels._math import exp


@jit
def _valid_rows(count, stream, M, ROWS):
    return (tl.minimum(tl.maximum(tl.load(count + stream), 0), M) * ROWS).to(tl.int32)


@jit
def _memory_attention_fwd_kernel(
    query, keys, values, count, key_scale, value_scale, out, stats, N, M, ROWS, S, G, SCALE, SPLITS,
    E: tl.constexpr, WHOLE: tl.constexpr, QUANTIZED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute `stats [SPLITS, 2, S, G, N]` and `out [SPLITS, S, N, G, E]`, divided by the sums if WHOLE."""
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    split, program = (tl.program_id(1) % SPLITS).to(tl.int64), (tl.program_id(1) // SPLITS).to(tl.int64)
    stream, head = program // G, program % G
    valid = _valid_rows(count, stream, M, ROWS)
    share = tl.cdiv(tl.cdiv(valid, SPLITS), BLOCK_M) * BLOCK_M
    begin = tl.minimum(split.to(tl.int32) * share, valid)
    end = tl.minimum(begin + share, valid)
    k_head = head_of(keys, stream, head, M * ROWS, G, E)
    v_head = head_of(values, stream, head, M * ROWS, G, E)
    q = load_rows(head_of(query, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E)
    most = tl.full((BLOCK_N,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(begin, end, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        k = load_rows(k_head, start, end, G, E, BLOCK_M, BLOCK_E)
        # 8-bit integers are exact in every dtype of the query
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * SCALE
        if QUANTIZED:
            s *= load_scales(key_scale, stream, head, start, end, M * ROWS, G, BLOCK_M)[None, :]
        s = tl.where((j < end)[None, :], s, NOTHING)
        p, shrink, most, total = soften(s, most, total, q.dtype == tl.float32)
        v = load_rows(v_head, start, end, G, E, BLOCK_M, BLOCK_E)
        if QUANTIZED:
            factor = load_scales(value_scale, stream, head, start, end, M * ROWS, G, BLOCK_M)
            v = (v.to(tl.float32) * factor[:, None]).to(q.dtype)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    if WHOLE:
        acc = tl.where(valid > 0, acc / total[:, None], 0.0)
        most = tl.where(most == NOTHING, 0.0, most)
    store_rows(head_of(out, split * S + stream, head, N, G, E), acc, first, N, G, E, BLOCK_N, BLOCK_E)
    store_stats(stats + split * 2 * S * G * N, program, i, N, S, G, most, total)


@jit
def _memory_attention_combine_kernel(
    partial, partial_stats, count, out, stats, N, M, ROWS, S, G, SPLITS,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    # inlined, because with load_stats and store_stats this kernel spills registers on sm_80
    size = (tl.zeros((), tl.int64) + S) * G * N
    at = program * N + i
    most = tl.full((BLOCK_N,), NOTHING, tl.float32)
    for split in range(0, SPLITS):
        most = tl.maximum(most, tl.load(partial_stats + split * 2 * size + at, i < N, other=0.0))
    most = tl.where(most == NOTHING, 0.0, most)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for split in range(0, SPLITS):
        weight = exp(tl.load(partial_stats + split * 2 * size + at, i < N, other=0.0) - most)
        total += weight * tl.load(partial_stats + (split * 2 + 1) * size + at, i < N, other=0.0)
        share = head_of(partial, split * S + stream, head, N, G, E)
        acc += weight[:, None] * load_rows(share, first, N, G, E, BLOCK_N, BLOCK_E)
    acc = tl.where(_valid_rows(count, stream, M, ROWS) > 0, acc / total[:, None], 0.0)
    store_rows(head_of(out, stream, head, N, G, E), acc, first, N, G, E, BLOCK_N, BLOCK_E)
    tl.store(stats + at, most, i < N)
    tl.store(stats + size + at, total, i < N)


@jit
def _memory_attention_delta_kernel(
    grad, out, delta, N, G, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Compute `delta [S, G, N]`, the product of a query's output and its gradient, for the scores' gradients."""
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    g = load_rows(head_of(grad, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E).to(tl.float32)
    o = load_rows(head_of(out, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E).to(tl.float32)
    tl.store(delta + program * N + i, tl.sum(g * o, 1), i < N)


@jit
def _memory_attention_slots_bwd_kernel(
    grad, query, keys, values, count, stats, delta, to_keys, to_values, N, M, ROWS, S, G, SCALE,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    j = first + tl.arange(0, BLOCK_M)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    valid = _valid_rows(count, stream, M, ROWS)
    k = load_rows(head_of(keys, stream, head, M * ROWS, G, E), first, valid, G, E, BLOCK_M, BLOCK_E)
    v = load_rows(head_of(values, stream, head, M * ROWS, G, E), first, valid, G, E, BLOCK_M, BLOCK_E)
    q_head, g_head = head_of(query, stream, head, N, G, E), head_of(grad, stream, head, N, G, E)
    to_k = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    to_v = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    # a block without valid keys only stores zeros
    queries = tl.where(first < valid, N, 0)
    for start in range(0, queries, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        q = load_rows(q_head, start, N, G, E, BLOCK_N, BLOCK_E)
        most, total = load_stats(stats, program, i, N, S, G)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE
        p = exp(s - most[None, :], q.dtype == tl.float32) / total[None, :]
        p = tl.where((j < valid)[:, None] & (i < N)[None, :], p, 0.0)
        g = load_rows(g_head, start, N, G, E, BLOCK_N, BLOCK_E)
        to_v += tl.dot(p.to(g.dtype), g, input_precision="ieee")
        slope = tl.dot(v, tl.trans(g), input_precision="ieee")
        slope = p * (slope - tl.load(delta + program * N + i, i < N, other=0.0)[None, :]) * SCALE
        to_k += tl.dot(slope.to(q.dtype), q, input_precision="ieee")
    store_rows(head_of(to_keys, stream, head, M * ROWS, G, E), to_k, first, M * ROWS, G, E, BLOCK_M, BLOCK_E)
    store_rows(head_of(to_values, stream, head, M * ROWS, G, E), to_v, first, M * ROWS, G, E, BLOCK_M, BLOCK_E)


@jit
def _memory_attention_query_bwd_kernel(
    grad, query, keys, values, count, key_scale, value_scale, stats, delta, to_query, N, M, ROWS, S, G, SCALE,
    E: tl.constexpr, QUANTIZED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    valid = _valid_rows(count, stream, M, ROWS)
    most, total = load_stats(stats, program, i, N, S, G)
    along = tl.load(delta + program * N + i, i < N, other=0.0)
    q = load_rows(head_of(query, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E)
    g = load_rows(head_of(grad, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E)
    k_head = head_of(keys, stream, head, M * ROWS, G, E)
    v_head = head_of(values, stream, head, M * ROWS, G, E)
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, valid, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        k = load_rows(k_head, start, valid, G, E, BLOCK_M, BLOCK_E)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * SCALE
        if QUANTIZED:
            factor = load_scales(key_scale, stream, head, start, valid, M * ROWS, G, BLOCK_M)
            s *= factor[None, :]
            if q.dtype != tl.float32:
                k = (k.to(tl.float32) * factor[:, None]).to(q.dtype)
        p = tl.where((j < valid)[None, :], exp(s - most[:, None], q.dtype == tl.float32) / total[:, None], 0.0)
        v = load_rows(v_head, start, valid, G, E, BLOCK_M, BLOCK_E)
        if QUANTIZED:
            factor = load_scales(value_scale, stream, head, start, valid, M * ROWS, G, BLOCK_M)
            v = (v.to(tl.float32) * factor[:, None]).to(q.dtype)
        slope = tl.dot(g, tl.trans(v), input_precision="ieee")
        slope = p * (slope - along[:, None]) * SCALE
        if QUANTIZED and q.dtype == tl.float32:
            # loaded this late because both forms at once do not fit the registers
            factor = load_scales(key_scale, stream, head, start, valid, M * ROWS, G, BLOCK_M)
            k = load_rows(k_head, start, valid, G, E, BLOCK_M, BLOCK_E).to(tl.float32) * factor[:, None]
        acc += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
    store_rows(head_of(to_query, stream, head, N, G, E), acc, first, N, G, E, BLOCK_N, BLOCK_E)


def memory_attention(
    query: Tensor, keys: Tensor, values: Tensor, count: Tensor, key_scale: Tensor | None, value_scale: Tensor | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, keys, values, count = query.contiguous(), keys.contiguous(), values.contiguous(), count.contiguous()
    scales = [count if scale is None else scale.contiguous() for scale in (key_scale, value_scale)]
    S, N, G, E = query.shape
    M, rows = keys.shape[1:3]
    out = torch.empty_like(query, dtype=torch.float32 if wide else query.dtype)
    stats = query.new_empty((2, S, G, N), dtype=torch.float32)
    if stats.numel() == 0:
        return out, stats
    config = blocks(E, query.dtype == torch.float32, quantized=key_scale is not None)
    along = triton.cdiv(N, config["BLOCK_N"])
    splits = key_shares(along * S * G, M * rows, config["BLOCK_M"], query.device)
    shares, share_stats = out, stats
    if splits > 1:
        shares = query.new_empty((splits, *query.shape), dtype=torch.float32)
        share_stats = stats.new_empty((splits, *stats.shape))
    with device_of(query):
        _memory_attention_fwd_kernel[(along, S * G * splits)](
            query, keys, values, count, *scales, shares, share_stats, N, M, rows, S, G, E**-0.5, splits, E=E,
            WHOLE=splits == 1, QUANTIZED=key_scale is not None, **config,
        )  # fmt: skip
        if splits > 1:
            _memory_attention_combine_kernel[(triton.cdiv(N, 16), S * G)](
                shares, share_stats, count, out, stats, N, M, rows, S, G, splits, E=E, BLOCK_N=16,
                BLOCK_E=config["BLOCK_E"],
            )  # fmt: skip
    return out, stats


def memory_attention_backward(
    grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, count: Tensor, key_scale: Tensor | None,
    value_scale: Tensor | None, out: Tensor, stats: Tensor, for_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, query, keys, values, count = (x.contiguous() for x in (grad, query, keys, values, count))
    scales = [count if scale is None else scale.contiguous() for scale in (key_scale, value_scale)]
    S, N, G, E = query.shape
    M, rows = keys.shape[1:3]
    shape = keys.shape if for_memory else (0,)
    if query.numel() == 0:
        return query.new_zeros(query.shape), query.new_zeros(shape), query.new_zeros(shape)
    to_query, to_keys, to_values = query.new_empty(query.shape), query.new_empty(shape), query.new_empty(shape)
    delta = stats.new_empty((S, G, N))
    wide = query.dtype == torch.float32
    over_slots, over_query = blocks(E, wide, "BLOCK_N"), blocks(E, wide, "BLOCK_M", key_scale is not None)
    saved = grad, query, keys, values, count
    sizes = N, M, rows, S, G, E**-0.5
    with device_of(query):
        _memory_attention_delta_kernel[(triton.cdiv(N, 16), S * G)](
            grad, out, delta, N, G, E=E, BLOCK_N=16, BLOCK_E=over_query["BLOCK_E"]
        )
        if to_keys.numel() > 0:
            _memory_attention_slots_bwd_kernel[(triton.cdiv(M * rows, over_slots["BLOCK_M"]), S * G)](
                *saved, stats, delta, to_keys, to_values, *sizes, E=E, **over_slots
            )
        _memory_attention_query_bwd_kernel[(triton.cdiv(N, over_query["BLOCK_N"]), S * G)](
            *saved, *scales, stats, delta, to_query, *sizes, E=E, QUANTIZED=key_scale is not None, **over_query
        )
    return to_query, to_keys, to_values
