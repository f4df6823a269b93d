"""Cosine similarity of consecutive frames, or of their tokens.

A program follows one token through a piece of time and keeps its previous row in registers, so every row is read once
(and one more per piece). Frames are compared by their means, one row each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit, power_of_two

_EPS = tl.constexpr(1e-8)
_WIDEST = 8192  # channels that still fit a program's registers


@jit
def _frame_mean_kernel(x, mean, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    frame = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < N)[:, None] & (d < D)[None, :]
        total += tl.load(x + (frame * N + n)[:, None] * D + d[None, :], mask, other=0.0).to(tl.float32)
    tl.store(mean + frame * D + d, tl.div_rn(tl.sum(total, 0), tl.zeros((BLOCK_D,), tl.float32) + N), d < D)


@jit
def _adjacent_similarity_fwd_kernel(
    x, similarity, norm, T, N, D, PIECE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    stream, n = token // N, token % N
    first = tl.program_id(1).to(tl.int64) * PIECE
    last = tl.minimum(first + PIECE, T - 1)
    d = tl.arange(0, BLOCK_D)
    row = x + ((stream * T + first) * N + n) * D
    if WHOLE:
        before = tl.load(row + d, d < D, other=0.0).to(tl.float32)
        square = tl.sum(before * before, 0)
    else:
        before = tl.zeros((BLOCK_D,), tl.float32)
        square = 0.0
        for start in range(0, D, BLOCK_D):
            value = tl.load(row + start + d, start + d < D, other=0.0).to(tl.float32)
            square += tl.sum(value * value, 0)
    norm_before = tl.sqrt_rn(square)
    if first == 0:
        tl.store(norm + stream * T * N + n, norm_before)
    for t in range(first, last):
        row += N * D
        if WHOLE:
            after = tl.load(row + d, d < D, other=0.0).to(tl.float32)
            product = tl.sum(before * after, 0)
            square = tl.sum(after * after, 0)
            before = after
        else:
            product = 0.0
            square = 0.0
            for start in range(0, D, BLOCK_D):
                mask = start + d < D
                old = tl.load(row - N * D + start + d, mask, other=0.0).to(tl.float32)
                new = tl.load(row + start + d, mask, other=0.0).to(tl.float32)
                product += tl.sum(old * new, 0)
                square += tl.sum(new * new, 0)
        norm_after = tl.sqrt_rn(square)
        # a comparison instead of a maximum keeps a NaN norm NaN
        a = tl.where(norm_before < _EPS, _EPS, norm_before)
        b = tl.where(norm_after < _EPS, _EPS, norm_after)
        tl.store(similarity + (stream * (T - 1) + t) * N + n, tl.div_rn(product, a * b))
        tl.store(norm + (stream * T + t + 1) * N + n, norm_after)
        norm_before = norm_after


@jit
def _coefficients(grad, similarity, norm, pair, at, other, there):
    """Return the gradient factors of one pair for the other row and for this one; a clamped norm is a constant."""
    g = tl.load(grad + pair, there, other=0.0)
    cos = tl.load(similarity + pair, there, other=0.0)
    own = tl.load(norm + at)
    a = tl.where(own < _EPS, _EPS, own)
    b = tl.load(norm + other, there, other=1.0)
    b = tl.where(b < _EPS, _EPS, b)
    return tl.div_rn(g, a * b), tl.where(own < _EPS, 0.0, tl.div_rn(g * cos, a * a))


@jit
def _adjacent_similarity_bwd_kernel(x, grad, similarity, norm, out, T, N, D, BLOCK_D: tl.constexpr):
    # time is the fastest index, so that neighbouring programs share rows in the second-level cache
    t, token = tl.program_id(0).to(tl.int64) % T, tl.program_id(0).to(tl.int64) // T
    stream, n = token // N, token % N
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    at, pair = (stream * T + t) * N + n, (stream * (T - 1) + t) * N + n
    has_before, has_after = t > 0, t + 1 < T
    before, self_before = _coefficients(grad, similarity, norm, pair - N, at, at - N, has_before)
    after, self_after = _coefficients(grad, similarity, norm, pair, at, at + N, has_after)
    mask = d < D
    total = -(self_before + self_after) * tl.load(x + at * D + d, mask, other=0.0).to(tl.float32)
    total += before * tl.load(x + (at - N) * D + d, d < tl.where(has_before, D, 0), other=0.0).to(tl.float32)
    total += after * tl.load(x + (at + N) * D + d, d < tl.where(has_after, D, 0), other=0.0).to(tl.float32)
    tl.store(out + at * D + d, total.to(out.dtype.element_ty), mask)


def compare(x: Tensor, piece: int | None = None) -> tuple[Tensor, Tensor]:
    """Return similarities and norms of tokens; `piece` is the number of pairs per program."""
    streams, steps, tokens, channels = x.shape
    similarity = x.new_empty((streams, max(steps - 1, 0), tokens), dtype=torch.float32)
    norm = x.new_empty((streams, steps, tokens), dtype=torch.float32)
    if norm.numel() == 0:
        return similarity, norm
    if piece is None:
        # long pieces read fewer rows twice, short pieces fill the device
        piece = 16 if streams * tokens * steps >= 1 << 14 else 1
    whole = channels <= _WIDEST
    block = max(16, power_of_two(channels)) if whole else 2048
    _adjacent_similarity_fwd_kernel[(streams * tokens, max(1, triton.cdiv(steps - 1, piece)))](
        x, similarity, norm, steps, tokens, channels, PIECE=piece, WHOLE=whole, BLOCK_D=block,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return similarity, norm


def adjacent_similarity(frames: Tensor, level: str) -> tuple[Tensor, Tensor, Tensor]:
    x = frames.contiguous()
    streams, steps, tokens, channels = x.shape
    mean = x.new_empty((streams, steps if level == "frame" else 0, 1, channels), dtype=torch.float32)
    with device_of(x):
        if level == "token":
            return *compare(x), mean
        if mean.numel() > 0:
            block = channel_block(channels, 128 if streams * steps >= 64 else 32)
            _frame_mean_kernel[(streams * steps, triton.cdiv(channels, block))](
                x, mean, tokens, channels, BLOCK_N=16, BLOCK_D=block
            )
        return *compare(mean), mean


def adjacent_similarity_backward(grad: Tensor, compared: Tensor, similarity: Tensor, norm: Tensor) -> Tensor:
    x = compared.contiguous()
    streams, steps, tokens, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    block = channel_block(channels, 1024)
    with device_of(x):
        _adjacent_similarity_bwd_kernel[(streams * tokens * steps, triton.cdiv(channels, block))](
            x, grad.contiguous(), similarity, norm, out, steps, tokens, channels, BLOCK_D=block
        )
    return out
