"""Quantise rows to 8 or 4 bits per value with one scale per row, and dequantise them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import device_of, jit, power_of_two

_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even


@jit
def _quantized(x, at, mask, scale, LARGEST: tl.constexpr):
    value = tl.load(x + at, mask, other=0.0).to(tl.float32)
    whole = (tl.div_rn(value, scale + tl.zeros_like(value)) + _MAGIC) - _MAGIC
    # in this form NaN becomes 0, the value that rows with a NaN scale have
    whole = tl.where(whole > LARGEST, LARGEST, tl.where(whole < -LARGEST, -LARGEST, whole))
    return tl.where(whole == whole, whole, 0.0).to(tl.int32)


@jit
def _quantize_slots_kernel(x, values, scales, D, STORED, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest: tl.constexpr = 127.0 if BITS == 8 else 7.0
    d = tl.arange(0, BLOCK)
    x += row * D
    values += row * STORED
    peak, odd = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, D, BLOCK):
        value = tl.load(x + start + d, start + d < D, other=0.0).to(tl.float32)
        size = tl.abs(value)
        finite = size < float("inf")
        peak = tl.maximum(peak, tl.where(finite, size, 0.0))
        odd |= tl.where(finite, 0, 1)
    scale = tl.div_rn(tl.max(peak, 0), tl.zeros((), tl.float32) + largest)
    scale = tl.where(scale < _TINY, 0.0, scale)
    usable = (scale > 0) & (tl.max(odd, 0) == 0)
    divisor = tl.where(usable, scale, 1.0)
    end = tl.where(usable, D, 0)
    if BITS == 8:
        for start in range(0, D, BLOCK):
            at = start + d
            whole = _quantized(x, at, at < end, divisor, largest)
            tl.store(values + at, whole.to(tl.int8), at < D)
    else:
        for start in range(0, STORED, BLOCK):
            at = start + d
            low = _quantized(x, 2 * at, 2 * at < end, divisor, largest)
            high = _quantized(x, 2 * at + 1, 2 * at + 1 < end, divisor, largest)
            tl.store(values + at, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), at < STORED)
    tl.store(scales + row, tl.where(tl.max(odd, 0) > 0, float("nan"), scale))


@jit
def _dequantize_slots_kernel(
    values, scales, wanted, out, M, N, D, STORED,
    GATHER: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = place
    if GATHER:
        row = tl.load(wanted + place)
        there = (row >= 0) & (row < M)
        row = tl.where(there, place // N * M + row, 0)
    d = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    scale = tl.load(scales + row).to(kind)
    if BITS == 8:
        value = tl.load(values + row * STORED + d, d < D, other=0).to(tl.int32)
    else:
        half = (tl.load(values + row * STORED + d // 2, d < D, other=0).to(tl.int32) >> ((d % 2).to(tl.int32) * 4)) & 15
        value = (half ^ 8) - 8
    back = (value.to(kind) * scale).to(out.dtype.element_ty)
    if GATHER:
        back = tl.where(there, back, 0.0)
    tl.store(out + place * D + d, back, d < D)


def quantize_slots(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, channels = x.contiguous(), x.shape[-1]
    stored = channels if bits == 8 else (channels + 1) // 2
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    values = x.new_empty((*scale.shape, stored), dtype=torch.int8 if bits == 8 else torch.uint8)
    if scale.numel() == 0:
        return values, scale
    if channels == 0:
        return values, scale.zero_()
    with device_of(x):
        _quantize_slots_kernel[(scale.numel(),)](
            rows, values, scale, channels, stored, BITS=bits, BLOCK=min(1024, max(16, power_of_two(channels)))
        )
    return values, scale


def dequantize_slots(values: Tensor, scale: Tensor, rows: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    stored, scales = values.contiguous(), scale.contiguous()
    wanted = scales if rows is None else rows.contiguous()
    out = scales.new_empty((*wanted.shape, dim), dtype=dtype)
    if out.numel() == 0 or scales.numel() == 0:
        return out.zero_()
    block = min(1024, max(16, power_of_two(dim)))
    gather = rows is not None
    with device_of(stored):
        _dequantize_slots_kernel[(wanted.numel(), triton.cdiv(dim, block))](
            stored, scales, wanted, out, scales.shape[1] if gather else 0, wanted.shape[1] if gather else 0, dim,
            stored.shape[-1], GATHER=gather, BITS=8 if stored.dtype == torch.int8 else 4, WIDE=dtype == torch.float64,
            BLOCK=block,
        )  # fmt: skip
    return out
