"""Bipartite soft matching: best partners tile by tile of the product, then ranks and places by counting.

Ranks and places are counts over the even rows, `key_j > key_i` or `j < i`. Each program counts for its own rows.
Nothing is sorted, and the result does not depend on the order of the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit, power_of_two
from vmemory.kernels.similarity_topk import _key

_EPS = tl.constexpr(1e-8)
_LOW = tl.constexpr(2**31 - 1)
_NOTHING = tl.constexpr(-(2**63))
_BLOCK = 64  # rows of either set that a program compares at once
_PROGRAMS = 512  # enough to fill a GPU; with fewer, several programs share the partners of a block


@jit
def _row(place, TOKENS, CLS, GROUPS):
    """Return the memory row of a place in matching order: the first CLS of each of GROUPS clips, then the rest."""
    place = place.to(tl.int64)
    rest, width = place - GROUPS * CLS, tl.maximum(TOKENS - CLS, 1)
    front = place // tl.maximum(CLS, 1) * TOKENS + place % tl.maximum(CLS, 1)
    return tl.where(rest < 0, front, rest // width * TOKENS + CLS + rest % width)


@jit
def _inverse_norm_kernel(metric, inverse, ROWS, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    square = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(metric + row[:, None] * D + d[None, :], (row < ROWS)[:, None] & (d < D)[None, :], other=0.0)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    norm = tl.sqrt_rn(square)
    tl.store(inverse + row, tl.div_rn(1.0, tl.where(norm < _EPS, _EPS, norm)), row < ROWS)


@jit
def _bipartite_match_kernel(
    metric, inverse, found, TOKENS, CLS, GROUPS, FRONT, EVENS, ODDS, D, TILES, PARTS, PART,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Find the best partner of each even row as a key of score and index, before division by the row's own norm."""
    program = tl.program_id(0).to(tl.int64)
    stream = program // PARTS // TILES
    base = stream * GROUPS * TOKENS
    i = (program // PARTS % TILES).to(tl.int32) * BLOCK_A + tl.arange(0, BLOCK_A)
    even = base + _row(FRONT + FRONT % 2 + 2 * i, TOKENS, CLS, GROUPS)
    # every lane keeps its own best, so the only reduction is at the end
    best = tl.full((BLOCK_A, BLOCK_B), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_A, BLOCK_B), tl.int32)
    begin = (program % PARTS).to(tl.int32) * PART
    for first in range(begin, tl.minimum(begin + PART, ODDS), BLOCK_B):
        j = first + tl.arange(0, BLOCK_B)
        odd = base + _row(FRONT + 1 - FRONT % 2 + 2 * j, TOKENS, CLS, GROUPS)
        dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            a = tl.load(metric + even[:, None] * D + d[None, :], (i < EVENS)[:, None] & (d < D)[None, :], other=0.0)
            b = tl.load(metric + odd[None, :] * D + d[:, None], (d < D)[:, None] & (j < ODDS)[None, :], other=0.0)
            dots = tl.dot(a, b, dots, input_precision="ieee")
        score = dots * tl.load(inverse + odd, j < ODDS, other=0.0)[None, :]
        better = ((score > best) | ((score != score) & (best == best))) & (j < ODDS)[None, :]
        best = tl.where(better, score, best)
        at = tl.where(better, j[None, :], at)
    # an integer maximum is the same in any order
    tl.atomic_max(found + stream * EVENS + i, tl.max(_key(best, at), 1), i < EVENS, sem="relaxed")


@jit
def _even_keys(found, inverse, base, i, TOKENS, CLS, GROUPS, FRONT, EVENS):
    """Return the keys of the best scores with their even rows, and the partners."""
    key = tl.load(found + i, i < EVENS, other=_NOTHING)
    bits = (key >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ _LOW, bits).to(tl.float32, bitcast=True)
    even = base + _row(FRONT + FRONT % 2 + 2 * i, TOKENS, CLS, GROUPS)
    score *= tl.load(inverse + even, i < EVENS, other=0.0)
    return tl.where(i < EVENS, _key(score, i), _NOTHING), ((key & _LOW) ^ _LOW).to(tl.int32)


@jit
def _merge_rank_kernel(
    found, inverse, partners, TOKENS, CLS, GROUPS, FRONT, EVENS, TILES, R,
    BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the partner of each of the R best even rows, -1 for the others."""
    program = tl.program_id(0).to(tl.int64)
    stream = program // TILES
    base = stream * GROUPS * TOKENS
    found += stream * EVENS
    i = (program % TILES).to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    own, partner = _even_keys(found, inverse, base, i, TOKENS, CLS, GROUPS, FRONT, EVENS)
    rank = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, EVENS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        other, _ = _even_keys(found, inverse, base, n, TOKENS, CLS, GROUPS, FRONT, EVENS)
        rank += tl.sum((other[None, :] > own[:, None]).to(tl.int32), 1)
    tl.store(partners + stream * EVENS + i, tl.where(rank < R, partner, -1), i < EVENS)


@jit
def _merge_places_kernel(
    partners, places, order, starts, TOKENS, CLS, GROUPS, FRONT, EVENS, ODDS, R, TILES,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the token of each row, the rows sorted by token, and the start of each token's rows."""
    program = tl.program_id(0).to(tl.int64)
    stream = program // TILES
    rows, tokens = GROUPS * TOKENS, GROUPS * TOKENS - R
    partners += stream * EVENS
    p = (program % TILES).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    behind = p - FRONT - FRONT % 2
    even = (p >= FRONT) & (p % 2 == 0) & (p < rows)
    odd = (p >= FRONT) & (p % 2 == 1)
    i = tl.where(even, behind // 2, EVENS)
    partner = tl.load(partners + i, even, other=-1)
    j = tl.where(odd, (p - FRONT - 1 + FRONT % 2) // 2, partner)
    merged_before = tl.zeros((BLOCK_P,), tl.int32)
    with_lower = tl.zeros((BLOCK_P,), tl.int32)
    with_same = tl.zeros((BLOCK_P,), tl.int32)
    for start in range(0, EVENS, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        other = tl.load(partners + n, n < EVENS, other=-1)[None, :]
        earlier = (other >= 0) & (n[None, :] < i[:, None])
        merged_before += tl.sum(earlier.to(tl.int32), 1)
        with_lower += tl.sum(((other >= 0) & (other < j[:, None])).to(tl.int32), 1)
        with_same += tl.sum((earlier & (other == j[:, None])).to(tl.int32), 1)
    first_odd = FRONT + EVENS - R
    single = tl.where(even, FRONT + i - merged_before, p)
    token = tl.where(j >= 0, first_odd + j, single)
    at = tl.where(j >= 0, first_odd + j + with_lower, single)
    merged = even & (partner >= 0)
    at = tl.where(merged, at + 1 + with_same, at)
    row = _row(p, TOKENS, CLS, GROUPS)
    tl.store(places + stream * rows + row, token.to(tl.int64), p < rows)
    tl.store(order + stream * rows + at, row, p < rows)
    starts += stream * (tokens + 1)
    tl.store(starts + token, at.to(tl.int64), (p < rows) & (merged == 0))
    tl.store(starts + tokens + p, tl.zeros((BLOCK_P,), tl.int64) + rows, p == 0)


def bipartite_match(metric: Tensor, r: int, front: int, cls: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    x = metric.contiguous()
    batch, length, channels = x.shape
    streams, rows = batch // groups, groups * length
    evens, odds = (rows + 1) // 2 - (front + 1) // 2, rows // 2 - front // 2
    place = x.new_empty((streams, rows), dtype=torch.int64)
    order = x.new_empty((streams, rows), dtype=torch.int64)
    start = x.new_empty((streams, rows - r + 1), dtype=torch.int64)
    if rows == 0:
        return place, order, start.zero_()
    if streams == 0:
        return place, order, start
    layout = length, cls, groups, front, evens, odds
    partners = x.new_empty((streams, evens), dtype=torch.int32)
    block_d = channel_block(channels, 1024)
    block_r = max(1, 2048 // block_d)
    with device_of(x):
        if r > 0:
            inverse = x.new_empty((batch * length,), dtype=torch.float32)
            _inverse_norm_kernel[(triton.cdiv(batch * length, block_r),)](
                x, inverse, batch * length, channels, BLOCK_R=block_r, BLOCK_D=block_d
            )
            found = x.new_full((streams, evens), -(2**63), dtype=torch.int64)
            tiles, blocks = triton.cdiv(evens, _BLOCK), triton.cdiv(odds, _BLOCK)
            part = triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // (streams * tiles))))
            parts = triton.cdiv(blocks, part)
            _bipartite_match_kernel[(streams * tiles * parts,)](
                x, inverse, found, *layout, channels, tiles, parts, part * _BLOCK,
                BLOCK_A=_BLOCK, BLOCK_B=_BLOCK, BLOCK_D=16 if x.element_size() == 4 else 32, num_warps=8,
            )  # fmt: skip
            tiles, block = triton.cdiv(evens, 16), min(256, max(16, power_of_two(evens)))
            _merge_rank_kernel[(streams * tiles,)](
                found, inverse, partners, length, cls, groups, front, evens, tiles, r, BLOCK_I=16, BLOCK_N=block
            )
        tiles, block = triton.cdiv(rows, 16), min(256, max(16, power_of_two(evens)))
        _merge_places_kernel[(streams * tiles,)](
            partners, place, order, start, *layout, r, tiles, BLOCK_P=16, BLOCK_N=block
        )
    return place, order, start
