"""Update memories of fixed slots: write to the next slot, read in order, or replace the most similar slot.

Every program of a launch reads the counters; only the last launch writes them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit, power_of_two

_EPS = tl.constexpr(1e-8)
_COPY = 2048  # values that a program copies
_CHUNK = 8192  # values of a frame that a program compares


@jit
def _target(streams, row, S, ROUTED: tl.constexpr):
    """Return the stream of a row of frames, -1 for none."""
    if ROUTED:
        stream = tl.load(streams + row)
        return tl.where((stream >= 0) & (stream < S), stream, -1)
    else:
        return row


@jit
def _counted(count, stream, added):
    """Return a stream's counter, clamped so that `added` more frames do not overflow it."""
    most = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64) - added
    return tl.minimum(tl.maximum(tl.load(count + stream), 0), most)


@jit
def _copy(source, target, start, size, BLOCK: tl.constexpr):
    d = start + tl.arange(0, BLOCK)
    tl.store(target + d, tl.load(source + d, d < size, other=0.0), d < size)


@jit
def _ring_push_kernel(
    slots, count, frames, streams, S, M, T, LAST, size, ROUTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, t = (tl.program_id(0) // LAST).to(tl.int64), T - LAST + (tl.program_id(0) % LAST).to(tl.int64)
    stream = _target(streams, row, S, ROUTED)
    if stream >= 0:
        slot = (_counted(count, stream, T) + t) % M
        start = tl.program_id(1).to(tl.int64) * BLOCK
        _copy(frames + (row * T + t) * size, slots + (stream * M + slot) * size, start, size, BLOCK)


@jit
def _ring_advance_kernel(count, streams, S, T, ROUTED: tl.constexpr):
    stream = _target(streams, tl.program_id(0).to(tl.int64), S, ROUTED)
    if stream >= 0:
        tl.store(count + stream, _counted(count, stream, T) + T)


@jit
def _ring_read_kernel(slots, count, out, held, M, size, BLOCK: tl.constexpr):
    stream, k = (tl.program_id(0) // M).to(tl.int64), (tl.program_id(0) % M).to(tl.int64)
    written = tl.load(count + stream)
    valid = tl.minimum(tl.maximum(written, 0), M)
    slot = tl.where(k < valid, (written - valid + k) % M, 0)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(slots + (stream * M + slot) * size + d, d < tl.where(k < valid, size, 0), other=0.0)
    tl.store(out + (stream * M + k) * size + d, value, d < size)
    if (k == 0) & (tl.program_id(1) == 0):
        tl.store(held + stream, valid)


@jit
def _before(count, streams, row, S, ROUTED: tl.constexpr):
    """Return the stream of a row and its counter before this call; -1, -1 for none."""
    stream = _target(streams, row, S, ROUTED)
    return stream, tl.where(stream >= 0, _counted(count, tl.maximum(stream, 0), 1), -1)


@jit
def _slot_mean_kernel(
    slots, count, frames, streams, mean, S, M, N, D, EACH, ROUTED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the means of the slots of full streams and, last, of the row's frame."""
    row, m = (tl.program_id(0) // EACH).to(tl.int64), (tl.program_id(0) % EACH).to(tl.int64)
    stream, before = _before(count, streams, row, S, ROUTED)
    own = m == EACH - 1
    if (before >= 0) & (own | (before >= M)):
        d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        source = slots + (stream * M + m) * N * D
        if own:
            source = frames + row * N * D
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N).to(tl.int64)
            mask = (n < N)[:, None] & (d < D)[None, :]
            total += tl.load(source + n[:, None] * D + d[None, :], mask, other=0.0).to(tl.float32)
        value = tl.div_rn(tl.sum(total, 0), tl.zeros((BLOCK_D,), tl.float32) + N)
        tl.store(mean + (row * EACH + m) * D + d, value, d < D)


@jit
def _slot_products_kernel(
    slots, count, own, streams, part, written, S, M, size, OWN_STEP, OWN_FIRST, BY_STREAM: tl.constexpr,
    ROUTED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute products of the row's vector with each slot's, and the squares of both, the row's own last."""
    row, m = (tl.program_id(0) // (M + 1)).to(tl.int64), (tl.program_id(0) % (M + 1)).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    stream, before = _before(count, streams, row, S, ROUTED)
    if (m == M) & (chunk == 0):
        tl.store(written + row, before)
    if before >= M:
        a = own + row * OWN_STEP + OWN_FIRST
        b = slots + ((stream if BY_STREAM else row) * (M if BY_STREAM else M + 1) + m) * size
        if m == M:
            b = a
        ab, bb = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, CHUNK, BLOCK):
            d = chunk * CHUNK + start + tl.arange(0, BLOCK)
            x = tl.load(a + d, d < size, other=0.0).to(tl.float32)
            y = tl.load(b + d, d < size, other=0.0).to(tl.float32)
            ab += x * y
            bb += y * y
        at = part + ((row * (M + 1) + m) * tl.num_programs(1) + chunk) * 2
        tl.store(at, tl.sum(ab, 0))
        tl.store(at + 1, tl.sum(bb, 0))


@jit
def _total(part, first, there, CHUNKS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, CHUNKS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = there[:, None] & (c < CHUNKS)[None, :]
        total += tl.load(part + (first[:, None] * CHUNKS + c[None, :]) * 2, mask, other=0.0)
    return tl.sum(total, 1)


@jit
def _guarded(square):
    norm = tl.sqrt_rn(square)
    # a comparison instead of a maximum keeps a NaN norm NaN
    return tl.where(norm < _EPS, _EPS, norm)


@jit
def _most_similar(part, row, M, CHUNKS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the first slot with the largest cosine; NaN is the largest of all."""
    k = tl.arange(0, BLOCK_M).to(tl.int64)
    base = row * (M + 1)
    own = tl.sum(tl.where(k == 0, _total(part + 1, base + M + k, k == 0, CHUNKS, BLOCK_M, BLOCK_C), 0.0), 0)
    chosen, best, nan = row * 0, tl.full((), float("-inf"), tl.float32), row * 0 + M
    for start in range(0, M, BLOCK_M):
        m = start + k
        product = _total(part, base + m, m < M, CHUNKS, BLOCK_M, BLOCK_C)
        square = _total(part + 1, base + m, m < M, CHUNKS, BLOCK_M, BLOCK_C)
        value = tl.div_rn(product, _guarded(square) * _guarded(own))
        nan = tl.minimum(nan, tl.min(tl.where((value != value) & (m < M), m, M), 0))
        value = tl.where((value != value) | (m >= M), float("-inf"), value)
        largest = tl.max(value, 0)
        first = tl.min(tl.where((value == largest) & (m < M), m, M), 0)
        chosen = tl.where(largest > best, first, chosen)
        best = tl.maximum(best, largest)
    return tl.where(nan < M, nan, chosen)


@jit
def _slot_replace_kernel(
    slots, count, means, frames, streams, mean, part, written, replaced, S, M, size, D, CHUNKS, MEAN_STEP, MEAN_FIRST,
    KEEPS_MEANS: tl.constexpr, ROUTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    before = tl.load(written + row)
    found = before * 0 - 1
    if before >= M:
        found = _most_similar(part, row, M, CHUNKS, BLOCK_M, BLOCK_C)
    slot = tl.where(found >= 0, found, before)
    if before >= 0:
        stream = _target(streams, row, S, ROUTED)
        _copy(frames + row * size, slots + (stream * M + slot) * size, piece * BLOCK, size, BLOCK)
        if piece == 0:
            tl.store(count + stream, before + 1)
            if KEEPS_MEANS:
                for start in range(0, D, BLOCK_D):
                    _copy(mean + row * MEAN_STEP + MEAN_FIRST, means + (stream * M + slot) * D, start, D, BLOCK_D)
    if piece == 0:
        tl.store(replaced + row, found)


def ring_push_(slots: Tensor, count: Tensor, frames: Tensor, streams: Tensor | None) -> None:
    x = frames.contiguous()
    routes = count if streams is None else streams.contiguous()
    rows, steps = x.shape[:2]
    held, capacity, size = slots.shape[0], slots.shape[1], slots.shape[2] * slots.shape[3]
    last, routed = min(steps, capacity), streams is not None
    if rows == 0 or steps == 0:
        return
    with device_of(x):
        if last * size > 0:
            _ring_push_kernel[(rows * last, triton.cdiv(size, _COPY))](
                slots, count, x, routes, held, capacity, steps, last, size, ROUTED=routed, BLOCK=_COPY
            )
        _ring_advance_kernel[(rows,)](count, routes, held, steps, ROUTED=routed, num_warps=1)


def ring_read(slots: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    x, written = slots.contiguous(), count.contiguous()
    streams, capacity, size = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    out, held = x.new_empty(x.shape), written.new_empty(written.shape)
    if streams * capacity == 0:
        return out, held.zero_()
    with device_of(x):
        _ring_read_kernel[(streams * capacity, max(1, triton.cdiv(size, _COPY)))](
            x, written, out, held, capacity, size, BLOCK=_COPY
        )
    return out, held


def slot_replace_(
    slots: Tensor, count: Tensor, means: Tensor | None, frames: Tensor, streams: Tensor | None, level: str
) -> Tensor:
    x = frames.contiguous()
    routes = count if streams is None else streams.contiguous()
    rows, (held, capacity, tokens, channels) = x.shape[0], slots.shape
    replaced = count.new_empty((rows,))
    if rows == 0:
        return replaced
    size, routed = tokens * channels, streams is not None
    if capacity == 0:
        with device_of(x):
            _ring_advance_kernel[(rows,)](count, routes, held, 1, ROUTED=routed, num_warps=1)
        return replaced.fill_(-1)
    # vectors to compare: whole frames, or the means of the slots followed by the frame's mean
    each = 1 if means is not None else capacity + 1
    compared = size if level == "flat" else channels
    chunks = max(1, triton.cdiv(compared, _CHUNK))
    made = (rows, each, channels) if level == "mean" else (0,)
    mean = x.new_empty(made, dtype=torch.float32)
    part = x.new_empty((rows, capacity + 1, chunks, 2), dtype=torch.float32)
    written = count.new_empty((rows,))
    own, own_step, own_first, others = x, size, 0, slots
    if level == "mean":
        own, own_step, own_first, others = mean, each * channels, (each - 1) * channels, mean
    if means is not None:
        others = means
    with device_of(x):
        if level == "mean":
            block = channel_block(channels, 128)
            _slot_mean_kernel[(rows * each, max(1, triton.cdiv(channels, block)))](
                slots, count, x, routes, mean, held, capacity, tokens, channels, each, ROUTED=routed, BLOCK_N=16,
                BLOCK_D=block,
            )  # fmt: skip
        _slot_products_kernel[(rows * (capacity + 1), chunks)](
            others, count, own, routes, part, written, held, capacity, compared, own_step, own_first,
            BY_STREAM=level == "flat" or means is not None, ROUTED=routed, CHUNK=_CHUNK, BLOCK=2048,
        )  # fmt: skip
        _slot_replace_kernel[(rows, max(1, triton.cdiv(size, _COPY)))](
            slots, count, slots if means is None else means, x, routes, mean, part, written, replaced, held, capacity,
            size, channels, chunks, own_step, own_first, KEEPS_MEANS=means is not None, ROUTED=routed, BLOCK=_COPY,
            BLOCK_M=min(64, max(16, power_of_two(capacity))), BLOCK_C=min(16, power_of_two(chunks)),
            BLOCK_D=max(16, min(1024, power_of_two(channels))),
        )  # fmt: skip
    return replaced
