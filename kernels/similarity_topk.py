"""Find the k most similar rows of a memory for each query, without storing the score matrix.

The best k rows lie in the k groups of neighbouring rows whose best rows are best. The first kernel reads the memory
once and keeps the best of every group. The k best groups are scored again by the same arithmetic, and their best k rows
are the result. Score and slot form one unique integer, so the result does not depend on the order of the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import device_of, jit, power_of_two
from vmemory.kernels._similarity_topk_backward import similarity_topk_backward

__all__ = ["similarity_topk", "similarity_topk_backward"]

_EPS = tl.constexpr(1e-8)
_NOTHING = tl.constexpr(-(2**63))
_LOW = tl.constexpr(2**31 - 1)


@jit
def _key(score, slot):
    """Return integers in the order of the scores: NaN highest, of equal scores the lower slot, all above `_NOTHING`."""
    # -0 and 0 must have the same key
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(score != score, _LOW, tl.where(bits < 0, bits ^ _LOW, bits))
    return (bits.to(tl.int64) << 32) | (slot ^ _LOW).to(tl.int64)


@jit
def _scored(
    query, query_norm, memory, scale, stream, q, m, searched, Q, M, D, CHANNELS,
    COSINE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return keys `[BLOCK_M, BLOCK_Q]` of rows m for queries q; CHANNELS is D, or 0 if no row is searched.

    In uint8 a row stores two channels per byte, the even one in the low half.
    """
    PACKED: tl.constexpr = memory.dtype.element_ty == tl.uint8
    d = tl.arange(0, BLOCK_D)
    query_row, row = query + (stream * Q + q) * D, stream * M + m
    dots = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    if PACKED:
        stored = (D + 1) // 2
        for start in range(0, (CHANNELS + 1) // 2, BLOCK_D):
            byte = start + d
            there = searched[:, None] & (byte < stored)[None, :]
            pair = tl.load(memory + row[:, None] * stored + byte[None, :], there, other=0).to(tl.int32)
            low, high = ((pair & 15) ^ 8) - 8, ((pair >> 4) ^ 8) - 8
            # with an odd number of channels the last half byte is undefined
            high = tl.where((2 * byte + 1 < D)[None, :], high, 0)
            at = query_row[None, :] + 2 * byte[:, None]
            asked = (q < Q)[None, :]
            x = tl.load(at, (byte < stored)[:, None] & asked, other=0.0)
            dots = tl.dot(low.to(x.dtype), x, dots, input_precision="ieee")
            x = tl.load(at + 1, (2 * byte + 1 < D)[:, None] & asked, other=0.0)
            dots = tl.dot(high.to(x.dtype), x, dots, input_precision="ieee")
            if COSINE:
                square += tl.sum((low * low + high * high).to(tl.float32), 1)
    else:
        for start in range(0, CHANNELS, BLOCK_D):
            channel = start + d < D
            x = tl.load(query_row[None, :] + (start + d)[:, None], channel[:, None] & (q < Q)[None, :], other=0.0)
            there = searched[:, None] & channel[None, :]
            rows = tl.load(memory + row[:, None] * D + (start + d)[None, :], there, other=0)
            dots = tl.dot(rows.to(x.dtype), x, dots, input_precision="ieee")
            if COSINE:
                wide = rows.to(tl.float32)
                square += tl.sum(wide * wide, 1)
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + row, searched, other=0.0)
        dots *= factor[:, None]
    if COSINE:
        norm = tl.sqrt_rn(square) * tl.abs(factor)
        norm = tl.where(norm < _EPS, _EPS, norm)
        beside = tl.load(query_norm + stream * Q + q, q < Q, other=1.0)
        dots = tl.div_rn(dots, norm[:, None] * tl.where(beside < _EPS, _EPS, beside)[None, :])
    return tl.where(searched[:, None], _key(dots, m[:, None]), _NOTHING)


@jit
def _similarity_topk_groups_kernel(
    query, query_norm, memory, count, where, scale, best, Q, M, D, TILES, QUERY_BLOCKS,
    COSINE: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WHERE: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the best key of every group of rows, `best [S, Q, TILES * BLOCK_M / GROUP]`."""
    program = tl.program_id(0).to(tl.int64)
    # programs that read the same rows have neighbouring numbers, to share the cache
    q = program % QUERY_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tile = program // QUERY_BLOCKS % TILES
    stream = program // QUERY_BLOCKS // TILES
    n = tl.zeros((), tl.int64) + M
    if HAS_COUNT:
        n = tl.minimum(tl.load(count + stream), n)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    searched = m < n
    if HAS_WHERE:
        searched = searched & (tl.load(where + stream * M + m, searched, other=0) != 0)
    channels = tl.where(tile * BLOCK_M < n, D, 0)
    keys = _scored(
        query, query_norm, memory, scale, stream, q, m, searched, Q, M, D, channels,
        COSINE, HAS_SCALE, BLOCK_Q, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    GROUPS: tl.constexpr = BLOCK_M // GROUP
    found = tl.max(tl.reshape(keys, (GROUPS, GROUP, BLOCK_Q)), 1)
    to = tile * GROUPS + tl.arange(0, GROUPS)
    tl.store(best + (stream * Q + q)[None, :] * (TILES * GROUPS) + to[:, None], found, (q < Q)[None, :])


@jit
def _similarity_topk_rows_kernel(
    query, query_norm, memory, count, where, scale, chosen, keys, Q, M, D, TILES, K,
    COSINE: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WHERE: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr, KP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write every key of the chosen groups, `keys [S, Q, TILES * BLOCK_M]`."""
    program = tl.program_id(0).to(tl.int64)
    place, tile = program // TILES, program % TILES
    stream, own = place // Q, place % Q
    n = tl.zeros((), tl.int64) + M
    if HAS_COUNT:
        n = tl.minimum(tl.load(count + stream), n)
    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.load(chosen + place * KP + at // GROUP, at // GROUP < K, other=_NOTHING)
    m = ((group & _LOW) ^ _LOW) // GROUP * GROUP + at % GROUP
    searched = (group != _NOTHING) & (m < n)
    if HAS_WHERE:
        searched = searched & (tl.load(where + stream * M + m, searched, other=0) != 0)
    # the same block of queries as in the first kernel, so that scores are bit-identical
    q = own // BLOCK_Q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.where(tl.max(searched.to(tl.int32), 0) > 0, D, 0)
    found = _scored(
        query, query_norm, memory, scale, stream, q, m, searched, Q, M, D, channels,
        COSINE, HAS_SCALE, BLOCK_Q, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    tl.store(keys + place * TILES * BLOCK_M + at, tl.max(tl.where((q == own)[None, :], found, _NOTHING), 1))


@jit
def _similarity_topk_choose_kernel(keys, chosen, N, PIECES, PIECE, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Write the KP largest keys of a piece, in order."""
    program = tl.program_id(0).to(tl.int64)
    keys += program // PIECES * N
    first, places = program % PIECES * PIECE, tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), _NOTHING, tl.int64)
    for start in range(first, tl.minimum(first + PIECE, N), BLOCK):
        found = tl.load(keys + start + places, start + places < N, other=_NOTHING)
        least = tl.max(tl.where(places == KP - 1, best, _NOTHING), 0)
        if tl.max(found, 0) > least:
            best = tl.topk(tl.reshape(tl.join(best, found), (2 * BLOCK,)), BLOCK)
    tl.store(chosen + program * KP + places, best, places < KP)


@jit
def _similarity_topk_result_kernel(chosen, values, indices, K, KP: tl.constexpr):
    place, j = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    best = tl.load(chosen + place * KP + j)
    high = (best >> 32).to(tl.int32)
    score = tl.where(high < 0, high ^ _LOW, high).to(tl.float32, bitcast=True)
    slot = (best & _LOW) ^ _LOW
    tl.store(values + place * K + j, tl.where(best == _NOTHING, -float("inf"), score), j < K)
    tl.store(indices + place * K + j, tl.where(best == _NOTHING, -1, slot), j < K)


def _choose(keys: Tensor, best: int) -> Tensor:
    """Return the largest keys `[S, Q, best]` of `[S, Q, N]`, first per piece, then of the pieces' results."""
    N, block = keys.shape[2], max(256, best)
    pieces = triton.cdiv(N, 8 * block)
    chosen = keys.new_empty((*keys.shape[:2], pieces * best))
    piece = triton.cdiv(triton.cdiv(N, pieces), block) * block
    _similarity_topk_choose_kernel[(chosen.numel() // best,)](
        keys, chosen, N, pieces, piece, KP=best, BLOCK=block, num_warps=4, maxnreg=168
    )
    return chosen if pieces == 1 else _choose(chosen, best)


def similarity_topk(
    query: Tensor, memory: Tensor, count: Tensor | None, where: Tensor | None, scale: Tensor | None,
    norm: Tensor | None, k: int, metric: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # `norm` is not used: the kernel is bound by reading the rows, so summing their squares costs no time
    query, memory = query.contiguous(), memory.contiguous()
    streams, queries, channels = query.shape
    slots = memory.shape[1]
    values = query.new_full((streams, queries, k), -torch.inf, dtype=torch.float32)
    indices = query.new_full((streams, queries, k), -1, dtype=torch.int64)
    if values.numel() == 0 or slots == 0:
        return values, indices
    places = streams * queries
    block_q = 16 if queries <= 16 else 64
    block_m, block_d = 64, 16 if query.dtype == torch.float32 else 64
    if memory.dtype == torch.uint8:
        # in bytes, which hold two channels
        block_d = max(16, block_d // 2)
    # chosen groups are scored twice, so groups are small if many are chosen
    group = 64 if k <= 64 and queries <= 16 else 16
    best = max(16, power_of_two(k))
    tiles, query_blocks = triton.cdiv(slots, block_m), triton.cdiv(queries, block_q)
    groups = query.new_empty((streams, queries, tiles * block_m // group), dtype=torch.int64)
    chosen_groups = min(k, groups.shape[2])
    chosen_tiles = triton.cdiv(chosen_groups * group, block_m)
    keys = query.new_empty((streams, queries, chosen_tiles * block_m), dtype=torch.int64)
    query_norm = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32) if metric == "cosine" else query
    inputs = query, query_norm, memory, *(query if x is None else x.contiguous() for x in (count, where, scale))
    options = {
        "COSINE": metric == "cosine", "HAS_COUNT": count is not None, "HAS_WHERE": where is not None,
        "HAS_SCALE": scale is not None, "GROUP": group, "BLOCK_Q": block_q, "BLOCK_M": block_m, "BLOCK_D": block_d,
        "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    with device_of(query):
        _similarity_topk_groups_kernel[(streams * tiles * query_blocks,)](
            *inputs, groups, queries, slots, channels, tiles, query_blocks, **options
        )
        _similarity_topk_rows_kernel[(places * chosen_tiles,)](
            *inputs, _choose(groups, best), keys, queries, slots, channels, chosen_tiles, k, KP=best, **options
        )
        _similarity_topk_result_kernel[(places,)](_choose(keys, best), values, indices, k, KP=best, num_warps=4)
    return values, indices
