"""Shared parts of the attention kernels: rows of one head, their scales, the online softmax, block sizes."""

from __future__ import annotations

import torch
import triton.language as tl

from vmemory.kernels._launch import jit, power_of_two
from vmemory.kernels._math import exp

NOTHING = tl.constexpr(-float("inf"))
"""The largest score of a query without a key."""


@jit
def head_of(x, stream, head, rows, G, E):
    """Return the address of a head of a stream in `[S, rows, G, E]`; uint8 stores two channels per byte."""
    return x + (stream * rows * G + head) * ((E + 1) // 2 if x.dtype.element_ty == tl.uint8 else E)


@jit
def load_rows(x, start, end, G, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load rows [start, start + BLOCK) of a head, zeros from row `end` on."""
    i, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    mask = (start + i < end)[:, None]
    if E != BLOCK_E:
        mask = mask & (e < E)[None, :]
    # 64-bit address for the block, 32-bit offsets within it
    first = tl.zeros((), tl.int64) + start
    if x.dtype.element_ty == tl.uint8:
        row: tl.constexpr = (E + 1) // 2
        pair = tl.load(x + first * G * row + (i[:, None] * (G * row) + (e // 2)[None, :]), mask, other=0).to(tl.int32)
        return ((((pair >> (e % 2 * 4)[None, :]) & 15) ^ 8) - 8).to(tl.int8)
    else:
        return tl.load(x + first * G * E + (i[:, None] * (G * E) + e[None, :]), mask, other=0)


@jit
def load_scales(scale, stream, head, start, end, rows, G, BLOCK: tl.constexpr):
    """Load scales of rows [start, start + BLOCK) of a head in `[S, rows, G]`, zeros from row `end` on."""
    i = (tl.zeros((), tl.int64) + start) + tl.arange(0, BLOCK)
    return tl.load(scale + (stream * rows + i) * G + head, i < end, other=0.0)


@jit
def soften(s, most, total, FINE: tl.constexpr):
    """Update the online softmax with scores: return exp(s - largest), exp(most - largest), largest and sum."""
    largest = tl.maximum(most, tl.max(s, 1))
    # -inf - (-inf) would be NaN for a query whose scores so far are all -inf
    base = tl.where(largest == NOTHING, 0.0, largest)
    p = exp(s - base[:, None], FINE)
    shrink = exp(most - base, FINE)
    return p, shrink, largest, total * shrink + tl.sum(p, 1)


@jit
def load_stats(stats, program, i, N, S, G):
    """Load the largest score and the sum of queries i of a head from `[2, S, G, N]`."""
    at = stats + program * N + i
    return tl.load(at, i < N, other=0.0), tl.load(at + (tl.zeros((), tl.int64) + S) * G * N, i < N, other=1.0)


@jit
def store_stats(stats, program, i, N, S, G, most, total):
    at = stats + program * N + i
    tl.store(at, most, i < N)
    tl.store(at + (tl.zeros((), tl.int64) + S) * G * N, total, i < N)


@jit
def store_rows(x, value, start, end, G, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    i, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    mask = (start + i < end)[:, None] & (e < E)[None, :]
    at = x + (tl.zeros((), tl.int64) + start) * G * E + (i[:, None] * (G * E) + e[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask)


# the largest blocks that spill no register, by the channels of a head
_BESIDE_QUANTIZED = {64: (32, 32, 1), 128: (32, 16, 1), 256: (16, 32, 2)}


def blocks(E: int, wide: bool, across: str = "", quantized: bool = False) -> dict[str, int]:
    """Return block sizes for the channels of a head; float32 rows need more space, without tensor cores.

    `across` names the side along which the backward pass iterates. This side gets half the block, because the pass
    keeps more values at once. For quantised slots it keeps both forms of a row, so both sides are small.
    """
    block_e = max(16, power_of_two(E))
    side = max(16, min(32 if wide else 64, (2048 if wide else 8192) // block_e))
    sizes = {"BLOCK_N": side, "BLOCK_M": side, "BLOCK_E": block_e}
    if across and quantized:
        rows, slots, stages = (16, 16, 1) if wide else _BESIDE_QUANTIZED[min(max(block_e, 64), 256)]
        return sizes | {"BLOCK_N": rows, "BLOCK_M": slots, "num_warps": 8, "num_stages": stages}
    if across:
        sizes[across] = max(16, side // 2)
    if quantized and wide:
        # rows that are copied ahead take 16 channels per thread, with four times the bytes in float32
        return sizes | {"num_warps": 8, "num_stages": 1 if block_e > 128 else 2}
    return sizes | {"num_warps": 8 if side * block_e >= 4096 else 4, "num_stages": 2}


def key_shares(programs: int, rows: int, block: int, device: torch.device) -> int:
    """Return the number of shares of the keys with which the programs fill the device."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6
    return max(1, min(wanted // programs, rows // (4 * block), 32))
