"""Column sums of an attention map, without storing the map.

The first kernel computes the largest score and the sum of each query. Where few queries would leave the device idle
it splits the keys, and another kernel combines the shares. The next computes the weights again and adds each column in
one program, in the order of the queries. The backward pass computes the weights twice more: for the queries' gradient,
with its mean term, and for the keys' gradient.
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
    load_stats,
    soften,
    store_rows,
    store_stats,
)
from vmemory.kernels._launch import device_of, jit
from vmemory.kernels._math import exp


@jit
def _last(start, N, M, CAUSAL: tl.constexpr):
    """Return one past the last of M keys that query `start` sees."""
    return tl.minimum(tl.maximum(start + M - N + 1, 0), M) if CAUSAL else M


@jit
def _weights(q, k, most, total, i, j, N, M, SCALE, CAUSAL: tl.constexpr):
    """Compute weights `[BLOCK_N, BLOCK_M]` of keys j for queries i; 0 for pairs that are hidden or do not exist."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    p = exp(s - most[:, None], q.dtype == tl.float32) / total[:, None]
    return tl.where(_seen(i, j, N, M, CAUSAL), p, 0.0)


@jit
def _seen(i, j, N, M, CAUSAL: tl.constexpr):
    seen = (i < N)[:, None] & (j < M)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None] + (M - N))
    return seen


@jit
def _attention_column_sums_stats_kernel(
    query, key, stats, N, M, S, G, SCALE, SPLITS, E: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute `stats [SPLITS, 2, S, G, N]` of a share of the keys: largest score, sum of exp(score - largest)."""
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    split, program = (tl.program_id(1) % SPLITS).to(tl.int64), (tl.program_id(1) // SPLITS).to(tl.int64)
    stream, head = program // G, program % G
    q = load_rows(head_of(query, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E)
    k_head = head_of(key, stream, head, M, G, E)
    most = tl.full((BLOCK_N,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    seen = _last(first + BLOCK_N - 1, N, M, CAUSAL)
    share = tl.cdiv(tl.cdiv(seen, SPLITS), BLOCK_M) * BLOCK_M
    begin = split.to(tl.int32) * share
    for start in range(begin, tl.minimum(begin + share, seen), BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        k = load_rows(k_head, start, M, G, E, BLOCK_M, BLOCK_E)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        s = tl.where(_seen(i, j, N, M, CAUSAL), s, NOTHING)
        _, _, most, total = soften(s, most, total, q.dtype == tl.float32)
    if WHOLE:
        most = tl.where(most == NOTHING, 0.0, most)
    store_stats(stats + split * 2 * S * G * N, program, i, N, S, G, most, total)


@jit
def _attention_column_sums_combine_kernel(partial, stats, N, S, G, SPLITS, BLOCK_N: tl.constexpr):
    """Reduce `partial [SPLITS, 2, S, G, N]` to `stats [2, S, G, N]`."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    size = (tl.zeros((), tl.int64) + 2) * S * G * N
    most = tl.full((BLOCK_N,), NOTHING, tl.float32)
    for split in range(0, SPLITS):
        of_share, _ = load_stats(partial + split * size, program, i, N, S, G)
        most = tl.maximum(most, of_share)
    most = tl.where(most == NOTHING, 0.0, most)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(0, SPLITS):
        of_share, share = load_stats(partial + split * size, program, i, N, S, G)
        total += exp(of_share - most) * share
    store_stats(stats, program, i, N, S, G, most, total)


@jit
def _attention_column_sums_fwd_kernel(
    query, key, stats, out, N, M, S, G, SCALE,
    E: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    j = first + tl.arange(0, BLOCK_M)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    k = load_rows(head_of(key, stream, head, M, G, E), first, M, G, E, BLOCK_M, BLOCK_E)
    q_head = head_of(query, stream, head, N, G, E)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    # queries before `begin` do not see the first key
    begin = tl.maximum(first - (M - N), 0) // BLOCK_N * BLOCK_N if CAUSAL else 0
    for start in range(begin, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        q = load_rows(q_head, start, N, G, E, BLOCK_N, BLOCK_E)
        most, total = load_stats(stats, program, i, N, S, G)
        sums += tl.sum(_weights(q, k, most, total, i, j, N, M, SCALE, CAUSAL), 0)
    tl.store(out + program * M + j, sums, j < M)


@jit
def _attention_column_sums_query_bwd_kernel(
    grad, query, key, stats, delta, to_query, N, M, S, G, SCALE,
    E: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute `delta [S, G, N]` and the queries' gradient.

    With w the gradient of a column and p the weights of a query, delta is the mean of w under p, and the gradient of a
    score is p (w - delta).
    """
    first = tl.program_id(0) * BLOCK_N
    i = first + tl.arange(0, BLOCK_N)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    q = load_rows(head_of(query, stream, head, N, G, E), first, N, G, E, BLOCK_N, BLOCK_E)
    k_head = head_of(key, stream, head, M, G, E)
    most, total = load_stats(stats, program, i, N, S, G)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    end = _last(first + BLOCK_N - 1, N, M, CAUSAL)
    for start in range(0, end, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        k = load_rows(k_head, start, M, G, E, BLOCK_M, BLOCK_E)
        w = tl.load(grad + program * M + j, j < M, other=0.0)
        mean += tl.sum(_weights(q, k, most, total, i, j, N, M, SCALE, CAUSAL) * w[None, :], 1)
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, end, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        k = load_rows(k_head, start, M, G, E, BLOCK_M, BLOCK_E)
        w = tl.load(grad + program * M + j, j < M, other=0.0)
        slope = _weights(q, k, most, total, i, j, N, M, SCALE, CAUSAL) * (w[None, :] - mean[:, None]) * SCALE
        slope = tl.where(_seen(i, j, N, M, CAUSAL), slope, 0.0)
        acc += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
    store_rows(head_of(to_query, stream, head, N, G, E), acc, first, N, G, E, BLOCK_N, BLOCK_E)
    tl.store(delta + program * N + i, mean, i < N)


@jit
def _attention_column_sums_key_bwd_kernel(
    grad, query, key, stats, delta, to_key, N, M, S, G, SCALE,
    E: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    j = first + tl.arange(0, BLOCK_M)
    program = tl.program_id(1).to(tl.int64)
    stream, head = program // G, program % G
    k = load_rows(head_of(key, stream, head, M, G, E), first, M, G, E, BLOCK_M, BLOCK_E)
    w = tl.load(grad + program * M + j, j < M, other=0.0)
    q_head = head_of(query, stream, head, N, G, E)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    begin = tl.maximum(first - (M - N), 0) // BLOCK_N * BLOCK_N if CAUSAL else 0
    for start in range(begin, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        q = load_rows(q_head, start, N, G, E, BLOCK_N, BLOCK_E)
        most, total = load_stats(stats, program, i, N, S, G)
        mean = tl.load(delta + program * N + i, i < N, other=0.0)
        slope = _weights(q, k, most, total, i, j, N, M, SCALE, CAUSAL) * (w[None, :] - mean[:, None]) * SCALE
        slope = tl.where(_seen(i, j, N, M, CAUSAL), slope, 0.0)
        acc += tl.dot(tl.trans(slope).to(q.dtype), q, input_precision="ieee")
    store_rows(head_of(to_key, stream, head, M, G, E), acc, first, M, G, E, BLOCK_M, BLOCK_E)


def blocks_of(E: int, wide: bool, across: str = "") -> dict[str, int]:
    """Return block sizes for the channels of a head; with float32 rows the weights need small blocks."""
    if wide:
        return blocks(E, wide) | {"BLOCK_N": 16, "BLOCK_M": 16, "num_warps": 8, "num_stages": 1}
    return blocks(E, wide, across)


def attention_column_sums(query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    query, key = query.contiguous(), key.contiguous()
    S, N, G, E = query.shape
    M = key.shape[1]
    out = query.new_zeros((S, G, M), dtype=torch.float32)
    stats = query.new_empty((2, S, G, N), dtype=torch.float32)
    if stats.numel() == 0:
        return out, stats
    config = blocks_of(E, query.dtype == torch.float32)
    sizes = N, M, S, G, E**-0.5
    along = triton.cdiv(N, config["BLOCK_N"])
    splits = key_shares(along * S * G, M, config["BLOCK_M"], query.device)
    shares = stats if splits == 1 else stats.new_empty((splits, *stats.shape))
    with device_of(query):
        _attention_column_sums_stats_kernel[(along, S * G * splits)](
            query, key, shares, *sizes, splits, E=E, CAUSAL=causal, WHOLE=splits == 1, **config
        )
        if splits > 1:
            _attention_column_sums_combine_kernel[(triton.cdiv(N, 16), S * G)](
                shares, stats, N, S, G, splits, BLOCK_N=16, num_warps=1
            )
        if M > 0:
            _attention_column_sums_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]), S * G)](
                query, key, stats, out, *sizes, E=E, CAUSAL=causal, **config
            )
    return out, stats


def attention_column_sums_backward(
    grad: Tensor, query: Tensor, key: Tensor, stats: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    grad, query, key = grad.contiguous(), query.contiguous(), key.contiguous()
    S, N, G, E = query.shape
    M = key.shape[1]
    to_query, to_key = torch.empty_like(query), torch.zeros_like(key)
    if query.numel() == 0:
        return to_query, to_key
    delta = stats.new_empty((S, G, N))
    wide = query.dtype == torch.float32
    over_query, over_key = blocks_of(E, wide, "BLOCK_M"), blocks_of(E, wide, "BLOCK_N")
    arguments = N, M, S, G, E**-0.5
    with device_of(query):
        _attention_column_sums_query_bwd_kernel[(triton.cdiv(N, over_query["BLOCK_N"]), S * G)](
            grad, query, key, stats, delta, to_query, *arguments, E=E, CAUSAL=causal, **over_query
        )
        if M > 0:
            _attention_column_sums_key_bwd_kernel[(triton.cdiv(M, over_key["BLOCK_M"]), S * G)](
                grad, query, key, stats, delta, to_key, *arguments, E=E, CAUSAL=causal, **over_key
            )
    return to_query, to_key
