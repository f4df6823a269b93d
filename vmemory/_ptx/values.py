"""Numbers as registers hold them: unsigned integers of 1, 2, 4 or 8 bytes (predicates: bool), of any shape."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

from vmemory._ptx.program import PtxError

__all__ = ["NUMPY", "decode", "encode", "immediate", "resized", "unsigned", "width"]

# NumPy has no bfloat16: such a value is float32 while one computes with it
NUMPY = {
    "pred": np.dtype(bool),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    **{f"{letter}{8 * size}": np.dtype(f"u{size}") for letter in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
}


@cache
def width(kind: str) -> int:
    """Return the bytes of a type."""
    return int(kind.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


@cache
def unsigned(size: int) -> np.dtype:
    return np.dtype(f"u{size}")


def resized(bits: Any, size: int) -> Any:
    """Return the low bytes of `bits`, or `bits` with zeros above."""
    return bits if bits.dtype.itemsize == size else bits.astype(unsigned(size))


def decode(bits: Any, kind: str) -> Any:
    """Return the value in a register; a narrow type takes the low bytes."""
    if kind == "pred":
        return bits
    bits = resized(bits, width(kind))
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(NUMPY[kind])


def encode(value: Any, kind: str) -> Any:
    """Return the bits of a value, rounded to the nearest number, halfway to even."""
    if kind == "pred":
        return value
    value = value.astype(NUMPY[kind], copy=False)
    if kind == "bf16":
        bits = value.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))
    return value.view(unsigned(value.dtype.itemsize))


@cache
def immediate(text: str, kind: str) -> Any:
    """Parse a number: 0f3F800000 and 0d3FF0000000000000 are bits of floats, 0x7fU and -1 integers."""
    if kind == "pred":
        return np.bool_(int(text) != 0)
    if found := re.fullmatch(r"0[fd]([0-9a-fA-F]+)", text):
        bits = int(found[1], 16)
    elif re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", text):
        bits = int(text.rstrip("U"), 0)
    else:
        raise PtxError(f"expected a register or a number, got {text!r}")
    size = width(kind)
    return decode(unsigned(size).type(bits % (1 << 8 * size)), kind)
