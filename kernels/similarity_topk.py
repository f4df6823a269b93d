"""The k most similar rows of a memory to each query, without the score matrix.

The best k rows lie in the k groups of neighbouring rows whose best rows are best. A first kernel reads the memory once
and keeps the best of every group; the k best groups are chosen, scored once more by the same arithmetic, and their best
k rows are the result. A score and its slot make one integer, all of them differ, so any order of work chooses alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, power_of_two

_EPS = tl.constexpr(1e-8)
_NOTHING = tl.constexpr(-(2**63))
_LOW = tl.constexpr(2**31 - 1)


@triton.jit
def _key(score, slot):
    """Integers in the order of the scores: NaN above all, of equal scores the lower slot, all above `_NOTHING`."""
    # -0 equals 0
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(score != score, _LOW, tl.where(bits < 0, bits ^ _LOW, bits))
    return (bits.to(tl.int64) << 32) | (slot ^ _LOW).to(tl.int64)


@triton.jit
def _norm(square):
    norm = tl.sqrt_rn(square)
    return tl.where(norm < _EPS, _EPS, norm)


@triton.jit
def _scored(
    query, memory, scale, stream, q, m, searched, Q, M, D, CHANNELS,
    COSINE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys `[BLOCK_M, BLOCK_Q]` of rows m for queries q; CHANNELS is D, or 0 where no row is searched."""
    d = tl.arange(0, BLOCK_D)
    query_row, row = query + (stream * Q + q) * D, stream * M + m
    dots = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
    square, query_square = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, CHANNELS, BLOCK_D):
        channel = start + d < D
        x = tl.load(query_row[None, :] + (start + d)[:, None], channel[:, None] & (q < Q)[None, :], other=0.0)
        rows = tl.load(memory + row[:, None] * D + (start + d)[None, :], searched[:, None] & channel[None, :], other=0)
        dots = tl.dot(rows.to(x.dtype), x, dots, input_precision="ieee")
        if COSINE:
            wide, x = rows.to(tl.float32), x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            query_square += tl.sum(x * x, 0)
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + row, searched, other=0.0)
        dots *= factor[:, None]
    if COSINE:
        norm = tl.sqrt_rn(square) * tl.abs(factor)
        norm = tl.where(norm < _EPS, _EPS, norm)
        dots = tl.div_rn(dots, norm[:, None] * _norm(query_square)[None, :])
    return tl.where(searched[:, None], _key(dots, m[:, None]), _NOTHING)


@triton.jit
def _similarity_topk_groups_kernel(
    query, memory, count, where, scale, best, Q, M, D, TILES, QUERY_BLOCKS,
    COSINE: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WHERE: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best key of every group of rows, `best [S, Q, TILES * BLOCK_M / GROUP]`."""
    program = tl.program_id(0).to(tl.int64)
    # programs that read the same rows run side by side
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
        query, memory, scale, stream, q, m, searched, Q, M, D, channels, COSINE, HAS_SCALE, BLOCK_Q, BLOCK_M, BLOCK_D
    )
    GROUPS: tl.constexpr = BLOCK_M // GROUP
    found = tl.max(tl.reshape(keys, (GROUPS, GROUP, BLOCK_Q)), 1)
    to = tile * GROUPS + tl.arange(0, GROUPS)
    tl.store(best + (stream * Q + q)[None, :] * (TILES * GROUPS) + to[:, None], found, (q < Q)[None, :])


@triton.jit
def _similarity_topk_rows_kernel(
    query, memory, count, where, scale, chosen, keys, Q, M, D, TILES, K,
    COSINE: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_WHERE: tl.constexpr, HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr, KP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every key of the chosen groups, `keys [S, Q, TILES * BLOCK_M]`."""
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
    # the queries beside it as before, so that a score comes out as before
    q = own // BLOCK_Q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.where(tl.max(searched.to(tl.int32), 0) > 0, D, 0)
    found = _scored(
        query, memory, scale, stream, q, m, searched, Q, M, D, channels, COSINE, HAS_SCALE, BLOCK_Q, BLOCK_M, BLOCK_D
    )
    tl.store(keys + place * TILES * BLOCK_M + at, tl.max(tl.where((q == own)[None, :], found, _NOTHING), 1))


@triton.jit
def _best_of(keys, first, N, KP: tl.constexpr, BLOCK: tl.constexpr):
    """The KP largest of `keys[first : N]`, in order."""
    best = tl.full((KP,), _NOTHING, tl.int64)
    for start in range(first, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.load(keys + at, at < N, other=_NOTHING)
        if tl.max(found, 0) > tl.min(best, 0):
            best = tl.topk(tl.reshape(tl.join(best, tl.topk(found, KP)), (2 * KP,)), KP)
    return best


@triton.jit
def _similarity_topk_choose_kernel(keys, chosen, N, PIECES, PIECE, KP: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    first = program % PIECES * PIECE
    best = _best_of(keys + program // PIECES * N, first, tl.minimum(first + PIECE, N), KP, BLOCK)
    tl.store(chosen + program * KP + tl.arange(0, KP), best)


@triton.jit
def _similarity_topk_result_kernel(keys, values, indices, N, K, KP: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    best = _best_of(keys + place * N, 0, N, KP, BLOCK)
    high = (best >> 32).to(tl.int32)
    score = tl.where(high < 0, high ^ _LOW, high).to(tl.float32, bitcast=True)
    slot = (best & _LOW) ^ _LOW
    j = tl.arange(0, KP)
    tl.store(values + place * K + j, tl.where(best == _NOTHING, -float("inf"), score), j < K)
    tl.store(indices + place * K + j, tl.where(best == _NOTHING, -1, slot), j < K)


@triton.jit
def _similarity_topk_share_kernel(
    grad, values, indices, query, memory, scale, share, Q, M, D, K, ENTRIES,
    COSINE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a value's gradient gives the other side, its query and its row, `share [3, S, Q, k]`.

    d cos / d a = b / (|a| |b|) - cos a / |a|^2, without the second term where |a| is clamped: there it is a constant.
    """
    entry = tl.program_id(0).to(tl.int64)
    place = entry // K
    slot = tl.load(indices + entry)
    there = slot >= 0
    row = place // Q * M + tl.maximum(slot, 0)
    across = tl.where(there, tl.load(grad + entry), 0.0)
    along_query, along_row = across * 0, across * 0
    if COSINE:
        query_square, row_square = 0.0, 0.0
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(query + place * D + d, d < D, other=0.0).to(tl.float32)
            y = tl.load(memory + row * D + d, d < tl.where(there, D, 0), other=0.0).to(tl.float32)
            query_square += tl.sum(x * x, 0)
            row_square += tl.sum(y * y, 0)
        a, b = tl.sqrt_rn(query_square), tl.sqrt_rn(row_square)
        if HAS_SCALE:
            b *= tl.abs(tl.load(scale + row, there, other=0.0))
        along = across * tl.where(there, tl.load(values + entry), 0.0)
        along_query = tl.where(a < _EPS, 0.0, tl.div_rn(along, a * a))
        along_row = tl.where(b < _EPS, 0.0, tl.div_rn(along, b * b))
        across = tl.div_rn(across, tl.where(a < _EPS, _EPS, a) * tl.where(b < _EPS, _EPS, b))
    tl.store(share + entry, across)
    tl.store(share + ENTRIES + entry, along_query)
    tl.store(share + 2 * ENTRIES + entry, along_row)


@triton.jit
def _similarity_topk_query_bwd_kernel(
    indices, query, memory, scale, share, out, Q, M, D, K, ENTRIES,
    HAS_SCALE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    own = 0.0
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        entry = place * K + k
        slot = tl.load(indices + entry, k < K, other=-1)
        there = slot >= 0
        row = place // Q * M + slot
        weight = tl.load(share + entry, there, other=0.0)
        own += tl.sum(tl.load(share + ENTRIES + entry, there, other=0.0), 0)
        if HAS_SCALE:
            weight *= tl.load(scale + row, there, other=0.0)
        rows = tl.load(memory + row[:, None] * D + d[None, :], there[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(weight[:, None] * rows.to(tl.float32), 0)
    total -= own * tl.load(query + place * D + d, d < D, other=0.0).to(tl.float32)
    tl.store(out + place * D + d, total.to(out.dtype.element_ty), d < D)


@triton.jit
def _similarity_topk_memory_bwd_kernel(rows, order, query, memory, share, out, D, K, ENTRIES, BLOCK_D: tl.constexpr):
    """One program sums everything a row is sent, in the order of the queries; `rows` are sorted, -1 for no row."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(rows + at)
    before = tl.load(rows + at - 1, at > 0, other=-1)
    if (row >= 0) & (row != before):
        total = tl.zeros((BLOCK_D,), tl.float32)
        own = 0.0
        same = row >= 0
        while same:
            entry = tl.load(order + at)
            own += tl.load(share + 2 * ENTRIES + entry)
            x = tl.load(query + entry // K * D + d, d < D, other=0.0).to(tl.float32)
            total += tl.load(share + entry) * x
            at += 1
            same = tl.load(rows + at, at < ENTRIES, other=-1) == row
        total -= own * tl.load(memory + row * D + d, d < D, other=0.0).to(tl.float32)
        tl.store(out + row * D + d, total.to(out.dtype.element_ty), d < D)


def _choose(keys: Tensor, best: int) -> Tensor:
    """The largest keys `[S, Q, best]` of `[S, Q, N]`, first of pieces, then of what these leave."""
    N, block = keys.shape[2], max(512, best)
    pieces = triton.cdiv(N, 8 * block)
    chosen = keys.new_empty((*keys.shape[:2], pieces * best))
    piece = triton.cdiv(triton.cdiv(N, pieces), block) * block
    _similarity_topk_choose_kernel[(chosen.numel() // best,)](
        keys, chosen, N, pieces, piece, KP=best, BLOCK=block, num_warps=4
    )
    return chosen if pieces == 1 else _choose(chosen, best)


def similarity_topk(
    query: Tensor, memory: Tensor, count: Tensor | None, where: Tensor | None, scale: Tensor | None, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    query, memory = query.contiguous(), memory.contiguous()
    streams, queries, channels = query.shape
    slots = memory.shape[1]
    values = query.new_full((streams, queries, k), -torch.inf, dtype=torch.float32)
    indices = query.new_full((streams, queries, k), -1, dtype=torch.int64)
    if values.numel() == 0 or slots == 0:
        return values, indices
    places = streams * queries
    block_q = 16 if queries <= 16 else 32 if queries <= 32 else 64
    block_m, block_d = 64, 32 if query.dtype == torch.float32 else 64
    # small groups where many are chosen, or by many queries: they are scored twice
    group = 64 if k <= 64 and queries <= 16 else 16
    best = max(16, power_of_two(k))
    tiles, query_blocks = triton.cdiv(slots, block_m), triton.cdiv(queries, block_q)
    groups = query.new_empty((streams, queries, tiles * block_m // group), dtype=torch.int64)
    chosen_groups = min(k, groups.shape[2])
    chosen_tiles = triton.cdiv(chosen_groups * group, block_m)
    keys = query.new_empty((streams, queries, chosen_tiles * block_m), dtype=torch.int64)
    inputs = query, memory, *(query if x is None else x.contiguous() for x in (count, where, scale))
    options = {
        "COSINE": metric == "cosine", "HAS_COUNT": count is not None, "HAS_WHERE": where is not None,
        "HAS_SCALE": scale is not None, "GROUP": group, "BLOCK_Q": block_q, "BLOCK_M": block_m, "BLOCK_D": block_d,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    with device_of(query):
        _similarity_topk_groups_kernel[(streams * tiles * query_blocks,)](
            *inputs, groups, queries, slots, channels, tiles, query_blocks, **options
        )
        _similarity_topk_rows_kernel[(places * chosen_tiles,)](
            *inputs, _choose(groups, best), keys, queries, slots, channels, chosen_tiles, k, KP=best, **options
        )
        if keys.shape[2] > 8 * max(512, best):
            keys = _choose(keys, best)
        _similarity_topk_result_kernel[(places,)](
            keys, values, indices, keys.shape[2], k, KP=best, BLOCK=max(512, best), num_warps=4
        )
    return values, indices


def similarity_topk_backward(
    grad: Tensor, values: Tensor, indices: Tensor, query: Tensor, memory: Tensor, scale: Tensor | None, metric: str,
    for_query: bool, for_memory: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, memory, indices = query.contiguous(), memory.contiguous(), indices.contiguous()
    streams, queries, channels = query.shape
    slots, k, entries = memory.shape[1], indices.shape[2], indices.numel()
    to_query = query.new_zeros(query.shape if for_query else (0,))
    to_memory = query.new_zeros(memory.shape if for_memory else (0,))
    if entries == 0 or channels == 0 or slots == 0:
        return to_query, to_memory
    share = query.new_empty((3, entries), dtype=torch.float32)
    scales = query if scale is None else scale.contiguous()
    block = channel_block(channels, 512)
    blocks = triton.cdiv(channels, block)
    with device_of(query):
        _similarity_topk_share_kernel[(entries,)](
            grad.contiguous(), values.contiguous(), indices, query, memory, scales, share, queries, slots, channels, k,
            entries, COSINE=metric == "cosine", HAS_SCALE=scale is not None, BLOCK_D=block,
        )  # fmt: skip
        if for_query:
            _similarity_topk_query_bwd_kernel[(streams * queries, blocks)](
                indices, query, memory, scales, share, to_query, queries, slots, channels, k, entries,
                HAS_SCALE=scale is not None, BLOCK_K=16, BLOCK_D=block,
            )  # fmt: skip
        if for_memory:
            stream = torch.arange(streams, device=query.device)[:, None, None]
            rows, order = torch.where(indices >= 0, stream * slots + indices, -1).flatten().sort(stable=True)
            _similarity_topk_memory_bwd_kernel[(entries, blocks)](
                rows, order, query, memory, share, to_memory, channels, k, entries, BLOCK_D=block
            )
    return to_query, to_memory
