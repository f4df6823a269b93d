"""Select the largest scores of each segment by a radix search for the threshold, and gather rows by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import device_of, from_host, jit, power_of_two

_BLOCK = 4096  # scores per block


@jit
def _keys(scores, at, inside, BITS: tl.constexpr):
    """Return unsigned keys in the order of the scores: equal for both zeros, largest for NaN, never 0."""
    x = tl.load(scores + at, inside, other=0.0)
    unsigned: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint16
    bits = x.to(unsigned, bitcast=True).to(tl.int64)
    sign: tl.constexpr = 1 << (BITS - 1)
    largest: tl.constexpr = (1 << BITS) - 1
    key = tl.where(bits >= sign, largest - bits, bits + sign)
    wide = x.to(tl.float32)
    return tl.where(wide == 0, sign, tl.where(wide != wide, largest, key))


@jit
def _members(scores, segments, segment, at, inside, BITS: tl.constexpr, SEGMENTED: tl.constexpr):
    key = _keys(scores, at, inside, BITS)
    if SEGMENTED:
        inside = inside & (tl.load(segments + at, inside, other=-1) == segment)
    return key, inside


@jit
def _select_cut_kernel(
    scores, segments, budgets, cuts, N, G, SEGMENT_STEP, BITS: tl.constexpr, SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the cut: keys above cuts[0] are kept, and keys equal to it up to index cuts[1]."""
    stream, segment = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    scores += stream * N
    segments += stream * SEGMENT_STEP
    rank = tl.load(budgets + segment)
    n = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    prefix = rank * 0
    ties = rank * 0
    whole = rank < 0
    for step in tl.static_range(0, BITS, 8):
        shift = BITS - 8 - step
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, N, BLOCK):
            key, member = _members(scores, segments, segment, start + n, start + n < N, BITS, SEGMENTED)
            member = member & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=member)
        total = tl.sum(counts, 0)
        above = total - tl.cumsum(counts, 0)
        if step == 0:
            whole = total <= rank
        here = (above < rank) & (rank <= above + counts)
        digit = tl.max(tl.where(here, bins, 0), 0)
        ties = tl.sum(tl.where(bins == digit, counts, 0), 0).to(tl.int64)
        rank -= tl.sum(tl.where(bins == digit, above, 0), 0)
        prefix = prefix * 256 + digit
    none = tl.load(budgets + segment) == 0
    prefix = tl.where(whole, 0, tl.where(none, (1 << BITS) - 1, prefix))
    last = tl.where(none, -1, rank * 0 + N)
    if (whole | none | (ties == rank)) == 0:
        seen = rank * 0
        for start in range(0, N, BLOCK):
            key, member = _members(scores, segments, segment, start + n, start + n < N, BITS, SEGMENTED)
            equal = (member & (key == prefix)).to(tl.int32)
            at = seen + tl.cumsum(equal, 0)
            last = tl.minimum(last, tl.min(tl.where((equal > 0) & (at == rank), start + n, N), 0))
            seen += tl.sum(equal, 0)
    tl.store(cuts + 2 * (stream * G + segment), prefix)
    tl.store(cuts + 2 * (stream * G + segment) + 1, last)


@jit
def _select_emit_kernel(
    scores, segments, cuts, indices, count, N, G, TOTAL, SEGMENT_STEP, BITS: tl.constexpr, SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0).to(tl.int64)
    scores += stream * N
    segments += stream * SEGMENT_STEP
    indices += stream * TOTAL
    cuts += stream * G * 2
    n = tl.arange(0, BLOCK)
    held = stream * 0
    for start in range(0, N, BLOCK):
        at = start + n
        kept = at < N
        key = _keys(scores, at, kept, BITS)
        if SEGMENTED:
            segment = tl.load(segments + at, kept, other=-1)
            kept = kept & (segment >= 0) & (segment < G)
            cut = tl.load(cuts + 2 * segment, kept, other=0)
            last = tl.load(cuts + 2 * segment + 1, kept, other=0)
        else:
            cut, last = tl.load(cuts), tl.load(cuts + 1)
        kept = kept & ((key > cut) | ((key == cut) & (at <= last)))
        place = held + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(indices + place, at.to(tl.int64), kept)
        held += tl.sum(kept.to(tl.int32), 0)
    tl.store(count + stream, held)
    for start in range(0, TOTAL, BLOCK):
        at = start + n
        tl.store(indices + at, tl.zeros((BLOCK,), tl.int64) - 1, (at >= held) & (at < TOTAL))


@jit
def _compact_kernel(
    x, keep, out, N, K, D, FILL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    stream = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(keep + stream * K + k, k < K, other=-1)
    there = ((row >= 0) & (row < N))[:, None] & (d < D)[None, :]
    value = tl.load(x + (stream * N + row)[:, None] * D + d[None, :], there, other=0)
    value = tl.where(there, value, tl.full((BLOCK_K, BLOCK_D), FILL, value.dtype))
    tl.store(out + (stream * K + k)[:, None] * D + d[None, :], value, (k < K)[:, None] & (d < D)[None, :])


@jit
def _compact_bwd_kernel(grad, places, first, out, N, K, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    stream = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(first + stream * (N + 1) + n, n < N, other=0)
    times = tl.load(first + stream * (N + 1) + n + 1, n < N, other=0) - begin
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(0, tl.max(times, 0)):
        k = tl.load(places + stream * K + begin + i, i < times, other=0)
        mask = (i < times)[:, None] & (d < D)[None, :]
        total += tl.load(grad + (stream * K + k)[:, None] * D + d[None, :], mask, other=0.0).to(tl.float32)
    mask = (n < N)[:, None] & (d < D)[None, :]
    tl.store(out + (stream * N + n)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask)


def _budgets(budgets: Sequence[int], like: Tensor) -> Tensor:
    if len(set(budgets)) == 1:
        # filled on the device, because a copy from the host would wait
        return like.new_full((len(budgets),), budgets[0], dtype=torch.int64)
    return from_host(budgets, like)


def select_tokens(scores: Tensor, budgets: Sequence[int], segments: Tensor | None) -> tuple[Tensor, Tensor]:
    x = scores.contiguous()
    (streams, tokens), groups, total = x.shape, len(budgets), sum(budgets)
    indices = x.new_empty((streams, total), dtype=torch.int64)
    count = x.new_empty((streams,), dtype=torch.int64)
    if streams == 0:
        return indices, count
    ids = x if segments is None else segments.contiguous()
    options = {
        "SEGMENT_STEP": tokens if segments is not None and segments.dim() == 2 else 0,
        "BITS": 8 * x.element_size(),
        "SEGMENTED": segments is not None,
        "BLOCK": min(_BLOCK, max(256, power_of_two(tokens))),
        "num_warps": 8,
    }
    with device_of(x):
        cuts = x.new_empty((streams, groups, 2), dtype=torch.int64)
        if groups > 0:
            _select_cut_kernel[(streams * groups,)](x, ids, _budgets(budgets, x), cuts, tokens, groups, **options)
        _select_emit_kernel[(streams,)](x, ids, cuts, indices, count, tokens, groups, total, **options)
    return indices, count


def _tile(rows: int, width: int) -> tuple[int, int]:
    block_d = min(1024, power_of_two(width))
    return max(1, min(2048 // block_d, power_of_two(rows))), block_d


def compact(rows: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
    places = keep.contiguous()
    streams, kept = places.shape
    moved = []
    for i, rows_in in enumerate(rows):
        x = rows_in.contiguous()
        out = x.new_empty((streams, kept, *x.shape[2:]))
        moved.append(out)
        if out.numel() == 0:
            continue
        if x.shape[1] == 0:
            out.fill_(0 if i == 0 or x.dtype == torch.bool else -1)
            continue
        width = out.numel() // (streams * kept)
        fill = 0 if i == 0 or x.dtype == torch.bool else -1
        if x.dtype == torch.bool:
            x, out = x.view(torch.int8), out.view(torch.int8)
        block_k, block_d = _tile(kept, width)
        with device_of(x):
            _compact_kernel[(triton.cdiv(kept, block_k), triton.cdiv(width, block_d), streams)](
                x, places, out, x.shape[1], kept, width, FILL=fill, BLOCK_K=block_k, BLOCK_D=block_d
            )
    return moved


def compact_backward(grad: Tensor, keep: Tensor, length: int) -> Tensor:
    g = grad.contiguous()
    streams, kept = keep.shape
    out = g.new_empty((streams, length, *g.shape[2:]))
    if out.numel() == 0:
        return out
    inside = torch.where((keep >= 0) & (keep < length), keep, length)
    # a stable sort groups the rows of one token, in the order in which they were kept
    rows, places = inside.sort(dim=1, stable=True)
    starts = torch.arange(length + 1, device=g.device).expand(streams, -1).contiguous()
    first = torch.searchsorted(rows, starts)
    width = out.numel() // (streams * length)
    block_n, block_d = _tile(length, width)
    with device_of(g):
        _compact_bwd_kernel[(triton.cdiv(length, block_n), triton.cdiv(width, block_d), streams)](
            g, places, first, out, length, kept, width, BLOCK_N=block_n, BLOCK_D=block_d
        )
    return out
