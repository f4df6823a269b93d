"""Quantise memory slots to 8 or 4 bits per value, with one scale per row."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmemory.ops._checks import check_device, check_floating, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import quantize_slots as _reference

_STEM = "quantize_slots"
_QUANTIZE = Backends("quantize_slots")
# the implementation is selected by the dtype of the stored values
_DEQUANTIZE = Backends(
    "dequantize_slots", native_dtypes=(torch.int8, torch.uint8), triton_dtypes=(torch.int8, torch.uint8)
)
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class QuantizedSlots(NamedTuple):
    """Values int8 `[..., D]`, or uint8 `[..., ceil(D / 2)]` with two values per byte; scale float32 `[...]`."""

    values: Tensor
    scale: Tensor


def _fake_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    *rows, channels = x.shape
    stored = channels if bits == 8 else (channels + 1) // 2
    kind = torch.int8 if bits == 8 else torch.uint8
    return x.new_empty((*rows, stored), dtype=kind), x.new_empty(rows, dtype=torch.float32)


def _fake_dequantize(values: Tensor, scale: Tensor, rows: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    return scale.new_empty((*(scale if rows is None else rows).shape, dim), dtype=dtype)


_quantize = Op("quantize_slots", "(Tensor x, int bits) -> (Tensor, Tensor)", _fake_quantize, stem=_STEM)
_dequantize = Op(
    "dequantize_slots",
    "(Tensor values, Tensor scale, Tensor? rows, SymInt dim, ScalarType dtype) -> Tensor",
    _fake_dequantize,
    stem=_STEM,
)


@with_backends(_QUANTIZE)
def quantize_slots(x: Tensor, bits: Literal[8, 4] = 8, *, impl: Impl = "auto") -> QuantizedSlots:
    """Quantise rows to 8 or 4 bits per value: symmetric, one scale per row, rounded half to even.

    scale = max|x| / 127 (4 bits: / 7) and value = x / scale, in float32 or better, so the error of a value is at most
    half a scale. A row whose scale would not be a normal number, such as a row of zeros, has scale 0 and values 0. A
    row with a NaN or an infinity, or whose scale exceeds float32, has scale NaN and values 0: it is dequantised to NaN.
    There is no gradient.

    Args:
        x: `[..., D]`, float64, float32, float16 or bfloat16, any strides.
        bits: 8 or 4. With 4, byte j holds channel 2j in its low half and channel 2j + 1 in its high half, in two's
            complement; the last high half of an odd D is 0.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `QuantizedSlots(values, scale)`: int8 `[..., D]`, −127 to 127, or uint8 `[..., ceil(D / 2)]`, −7 to 7; scale
        float32 `[...]`.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: Unsupported dtype, shape or bits.
        RuntimeError: `impl` names an implementation that cannot run here.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [..., D], got {type(x).__name__}")
    if x.dim() < 1:
        raise ValueError(f"x: expected a tensor [..., D], got shape {shape_of(x)}")
    check_floating("x", x)
    if isinstance(bits, bool) or bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits!r}")
    picked = _QUANTIZE.pick(x, impl)
    x = x.detach()
    return QuantizedSlots(
        *(_reference.quantize_slots(x, bits) if picked == "reference" else _quantize(picked, x, bits))
    )


@with_backends(_DEQUANTIZE)
def dequantize_slots(
    values: Tensor,
    scale: Tensor,
    *,
    rows: Tensor | None = None,
    dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """Dequantise rows that `quantize_slots` stored, all or selected ones: value · scale, in one pass.

    Args:
        values: int8 `[..., D]`, or uint8 `[..., ceil(D / 2)]` with two values a byte.
        scale: float32 `[...]`, on the device of `values`.
        rows: int64 `[S, N]`, on the device of `values`, which are then `[S, M, D]`: the rows to return, in any order. A
            row outside `range(M)` gives zeros. None = all.
        dim: D. Required for packed values with an odd D, otherwise derived from `values`.
        dtype: float64, float32, float16 or bfloat16. The product is taken in float32 (float64 for float64).
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[..., D]` of `dtype`; with `rows` `[S, N, D]`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported dtype, shape or device, or `dim` does not fit.
        RuntimeError: `impl` names an implementation that cannot run here.
    """
    for name, x, layout in (("values", values, "[..., D]"), ("scale", scale, "[...]")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")
    if values.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"values: expected int8, or uint8 with two values a byte, got {values.dtype}")
    if values.dim() < 1 or scale.dtype != torch.float32 or scale.shape != values.shape[:-1]:
        want = list(values.shape[:-1])
        raise ValueError(f"scale: expected float32 {want}, a row less than values, got {scale.dtype} {shape_of(scale)}")
    check_device("scale", scale, "values", values)
    if rows is not None:
        check_tensor("rows", rows, "[S, N]")
        if values.dim() != 3 or rows.dtype != torch.int64 or rows.shape[0] != values.shape[0]:
            shapes = f"got {rows.dtype} {shape_of(rows)} with values {shape_of(values)}"
            raise ValueError(f"rows: expected int64 [S, N] beside values [S, M, D], {shapes}")
        check_device("rows", rows, "values", values)
    if dtype not in _FLOATING:
        raise ValueError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype}")
    stored = values.shape[-1]
    most = stored if values.dtype == torch.int8 else 2 * stored
    least = most if values.dtype == torch.int8 else max(most - 1, 0)
    channels = most if dim is None else dim
    if not least <= channels <= most:
        raise ValueError(f"dim: expected {most if least == most else f'{least} or {most}'}, got {dim}")
    picked = _DEQUANTIZE.pick(values, impl)
    if picked == "reference":
        return _reference.dequantize_slots(values, scale, rows, channels, dtype)
    return _dequantize(picked, values, scale.detach(), rows, channels, dtype)
