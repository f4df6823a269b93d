"""Merge the most similar pair of temporal neighbours: similarities, choice, then one pass that moves the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit, power_of_two
from vmemory.kernels.adjacent_similarity import adjacent_similarity


@jit
def _first_largest_kernel(similarity, place, PAIRS, n, BLOCK: tl.constexpr):
    """Find the first of the largest similarities; NaN is the largest of all."""
    row = tl.program_id(0).to(tl.int64)
    similarity += row // n * PAIRS * n + row % n
    t = tl.arange(0, BLOCK).to(tl.int64)
    chosen, best, nan = row * 0, tl.full((), float("-inf"), tl.float32), row * 0 + PAIRS
    for start in range(0, PAIRS, BLOCK):
        at = start + t
        value = tl.load(similarity + at * n, at < PAIRS, other=float("-inf"))
        nan = tl.minimum(nan, tl.min(tl.where(value != value, at, PAIRS), 0))
        value = tl.where(value != value, float("-inf"), value)
        largest = tl.max(value, 0)
        first = tl.min(tl.where(value == largest, at, PAIRS), 0)
        chosen = tl.where(largest > best, first, chosen)
        best = tl.maximum(best, largest)
    tl.store(place + row, tl.where(nan < PAIRS, nan, chosen))


@jit
def _share(first, second):
    total = first + second
    return tl.where(total > 0, tl.div_rn(first, tl.where(total > 0, total, 1.0)), 0.5)


@jit
def _adjacent_merge_fwd_kernel(
    x, size, place, out, sizes, T, N, D, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n, t, stream = row % N, row // N % (T - 1), row // N // (T - 1)
    pair = tl.load(place + stream * (1 if WHOLE else N) + (0 if WHOLE else n))
    behind = (t > pair).to(tl.int64)
    at = (stream * T + t + behind) * N + n
    value = tl.load(x + at * D + d, d < D, other=0.0)
    held = tl.load(size + at)
    if t == pair:
        other = tl.load(size + at + N)
        weight = _share(held, other)
        after = tl.load(x + (at + N) * D + d, d < D, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * weight + after * (1 - weight)).to(value.dtype)
        held += other
    tl.store(out + row * D + d, value, d < D)
    if tl.program_id(1) == 0:
        tl.store(sizes + row, held)


@jit
def _adjacent_merge_bwd_kernel(grad, size, place, out, T, N, D, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n, t, stream = row % N, row // N % T, row // N // T
    pair = tl.load(place + stream * (1 if WHOLE else N) + (0 if WHOLE else n))
    behind = (t > pair).to(tl.int64)
    value = tl.load(grad + ((stream * (T - 1) + t - behind) * N + n) * D + d, d < D, other=0.0)
    if t - behind == pair:
        first = (stream * T + pair) * N + n
        weight = _share(tl.load(size + first), tl.load(size + first + N))
        weight = tl.where(behind > 0, 1 - weight, weight)
        value = (value.to(tl.float32) * weight).to(value.dtype)
    tl.store(out + row * D + d, value, d < D)


def adjacent_merge(bank: Tensor, size: Tensor, level: str) -> tuple[Tensor, Tensor, Tensor]:
    x, held = bank.contiguous(), size.contiguous()
    streams, entries, tokens, channels = x.shape
    similarity = adjacent_similarity(x, level)[0]
    compared = similarity.shape[2]
    place = similarity.new_empty((streams, compared), dtype=torch.int64)
    out = x.new_empty((streams, entries - 1, tokens, channels))
    sizes = held.new_empty((streams, entries - 1, tokens))
    if streams == 0:
        return out, sizes, place
    block = channel_block(channels, 1024)
    with device_of(x):
        _first_largest_kernel[(streams * compared,)](
            similarity, place, entries - 1, compared, BLOCK=min(256, max(16, power_of_two(entries - 1)))
        )
        _adjacent_merge_fwd_kernel[(sizes.numel(), max(1, triton.cdiv(channels, block)))](
            x, held, place, out, sizes, entries, tokens, channels, WHOLE=level == "frame", BLOCK_D=block
        )
    return out, sizes, place


def adjacent_merge_backward(grad: Tensor, size: Tensor, place: Tensor) -> Tensor:
    g, held = grad.contiguous(), size.contiguous()
    streams, entries, tokens, channels = g.shape[0], g.shape[1] + 1, *g.shape[2:]
    out = g.new_empty((streams, entries, tokens, channels))
    if out.numel() == 0:
        return out
    block = channel_block(channels, 1024)
    with device_of(g):
        _adjacent_merge_bwd_kernel[(streams * entries * tokens, triton.cdiv(channels, block))](
            g, held, place, out, entries, tokens, channels, WHOLE=place.shape[1] == 1, BLOCK_D=block
        )
    return out
