"""Gradients of the values of a search, summed in an order that does not depend on the scheduling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit

_EPS = tl.constexpr(1e-8)


@jit
def _channels(memory, row, d, D, mask):
    """Load channels d of rows in float32; uint8 stores two per byte, the even one in the low half."""
    if memory.dtype.element_ty == tl.uint8:
        pair = tl.load(memory + row * ((D + 1) // 2) + d // 2, mask, other=0).to(tl.int32)
        return ((((pair >> ((d % 2) * 4).to(tl.int32)) & 15) ^ 8) - 8).to(tl.float32)
    else:
        return tl.load(memory + row * D + d, mask, other=0).to(tl.float32)


@jit
def _similarity_topk_share_kernel(
    grad, values, indices, query, memory, scale, share, Q, M, D, K, ENTRIES,
    COSINE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the factors of a value's gradient for its query and its row, `share [3, S, Q, k]`.

    d cos / d a = b / (|a| |b|) - cos a / |a|^2; without the second term if |a| is clamped and thus constant.
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
            y = _channels(memory, row, d, D, d < tl.where(there, D, 0))
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


@jit
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
        rows = _channels(memory, row[:, None], d[None, :], D, there[:, None] & (d < D)[None, :])
        total += tl.sum(weight[:, None] * rows, 0)
    total -= own * tl.load(query + place * D + d, d < D, other=0.0).to(tl.float32)
    tl.store(out + place * D + d, total.to(out.dtype.element_ty), d < D)


@jit
def _similarity_topk_memory_bwd_kernel(rows, order, query, memory, share, out, D, K, ENTRIES, BLOCK_D: tl.constexpr):
    """Sum the gradients of one row in the order of the queries; `rows` are sorted, -1 for no row."""
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
