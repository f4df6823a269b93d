"""Functions of numbers that kernels share."""

from __future__ import annotations

import triton.language as tl

from vmemory.kernels._launch import jit

_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@jit
def exp(x, FINE: tl.constexpr = True):
    """Compute exp(x) of float32; FINE corrects the rounding of x · log2(e), whose error grows with x.

    A result that is rounded to 16 bits afterwards does not need the correction.
    """
    whole = x * _LOG2E
    y = tl.exp2(whole)
    if FINE:
        rest = tl.fma(x, tl.full(x.shape, _LOG2E, tl.float32), -whole) * _LN2
        y = tl.where(tl.abs(whole) < 120.0, y + y * rest, y)
    return y
