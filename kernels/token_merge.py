"""Compute weighted means of merged tokens and spread them back; the plan lists the rows of each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit


@jit
def _share(size, total, count):
    share = tl.where(total > 0, tl.div_rn(size, tl.where(total > 0, total, 1.0)), tl.div_rn(1.0, count.to(tl.float32)))
    return tl.where(count == 1, 1.0, share)


@jit
def _token_sum_kernel(
    x, size, order, starts, out, totals, M, N, D, MEAN: tl.constexpr, HAS_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Compute the mean or the sum of each token's rows, `[streams, N, D]`, from `x [streams, M, D]`."""
    program = tl.program_id(0).to(tl.int64)
    stream, token = program // N, program % N
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    # checking a plan would wait for the device, so its numbers are clamped to existing rows
    first = tl.minimum(tl.maximum(tl.load(starts + stream * (N + 1) + token), 0), M)
    last = tl.minimum(tl.load(starts + stream * (N + 1) + token + 1), M)
    order += stream * M
    total = (last - first).to(tl.float32)
    if HAS_SIZE:
        total = 0.0
        for at in range(first, last):
            total += tl.load(size + stream * M + tl.minimum(tl.maximum(tl.load(order + at), 0), M - 1))
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(first, last):
        row = stream * M + tl.minimum(tl.maximum(tl.load(order + at), 0), M - 1)
        value = tl.load(x + row * D + d, d < D, other=0.0).to(tl.float32)
        if MEAN:
            held = 1.0
            if HAS_SIZE:
                held = tl.load(size + row)
            value *= _share(held, total, last - first)
        sums += value
    tl.store(out + program * D + d, sums.to(out.dtype.element_ty), d < D)
    if MEAN and tl.program_id(1) == 0:
        tl.store(totals + program, total)


@jit
def _token_spread_kernel(
    x, size, totals, places, starts, out, M, N, D, SHARED: tl.constexpr, HAS_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Copy `x [streams, N, D]` to each row of its token, or the row's share of it, `[streams, M, D]`."""
    program = tl.program_id(0).to(tl.int64)
    stream = program // M
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.minimum(tl.maximum(tl.load(places + program), 0), N - 1)
    value = tl.load(x + (stream * N + token) * D + d, d < D, other=0.0)
    if SHARED:
        at = starts + stream * (N + 1) + token
        held = 1.0
        if HAS_SIZE:
            held = tl.load(size + program)
        share = _share(held, tl.load(totals + stream * N + token), tl.load(at + 1) - tl.load(at))
        value = (value.to(tl.float32) * share).to(value.dtype)
    tl.store(out + program * D + d, value, d < D)


def _sum(x: Tensor, size: Tensor | None, order: Tensor, start: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    x, order, start = x.contiguous(), order.contiguous(), start.contiguous()
    streams, rows, channels = x.shape
    tokens = start.shape[1] - 1
    out = x.new_empty((streams, tokens, channels))
    total = x.new_empty((streams, tokens), dtype=torch.float32)
    if total.numel() == 0:
        return out, total
    block = channel_block(channels, 1024)
    with device_of(x):
        _token_sum_kernel[(streams * tokens, max(1, triton.cdiv(channels, block)))](
            x, total if size is None else size.contiguous(), order, start, out, total, rows, tokens, channels,
            MEAN=mean, HAS_SIZE=size is not None, BLOCK_D=block,
        )  # fmt: skip
    return out, total


def _spread(x: Tensor, place: Tensor, shares: tuple[Tensor | None, Tensor, Tensor] | None) -> Tensor:
    x, place = x.contiguous(), place.contiguous()
    (streams, rows), (tokens, channels) = place.shape, x.shape[1:]
    out = x.new_empty((streams, rows, channels))
    if out.numel() == 0:
        return out
    size, total, start = shares or (None, x, place)
    block = channel_block(channels, 1024)
    with device_of(x):
        _token_spread_kernel[(streams * rows, triton.cdiv(channels, block))](
            x, total if size is None else size.contiguous(), total.contiguous(), place, start.contiguous(), out, rows,
            tokens, channels, SHARED=shares is not None, HAS_SIZE=size is not None, BLOCK_D=block,
        )  # fmt: skip
    return out


def token_merge(x: Tensor, size: Tensor | None, order: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return _sum(x, size, order, start, mean=True)


def token_merge_backward(grad: Tensor, size: Tensor | None, total: Tensor, place: Tensor, start: Tensor) -> Tensor:
    return _spread(grad, place, (size, total, start))


def token_unmerge(x: Tensor, place: Tensor) -> Tensor:
    return _spread(x, place, None)


def token_unmerge_backward(grad: Tensor, order: Tensor, start: Tensor) -> Tensor:
    return _sum(grad, None, order, start, mean=False)[0]
