"""Sizes in bytes, as people write them, and the capacities that fit one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST = 2**63


def parse_bytes(budget: str | int) -> int:
    """`"64MiB"`, `"1.5 GB"` or a number of bytes, as an int.

    Raises:
        ValueError: Not a positive size, or 2⁶³ bytes and more.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        size = budget
    else:
        text = budget if isinstance(budget, str) else ""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text, re.ASCII)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"budget: expected a size such as '64MiB' or a number of bytes, got {budget!r}")
        exact = float(match[1]) * _UNITS[match[2].upper()]
        size = int(exact) if math.isfinite(exact) else _MOST
    if not 0 < size < _MOST:
        raise ValueError(f"budget: expected a positive size below 2^63 bytes, got {budget!r}")
    return size


def format_bytes(size: float) -> str:
    """`67108864` as `"64.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def largest_entries(budget: str | int, least: int, nbytes: Callable[[int], int]) -> int:
    """The largest number of entries n >= `least` with `nbytes(n)` within the budget; `nbytes` grows with n.

    Raises:
        ValueError: Not even `least` entries fit.
    """
    size = parse_bytes(budget)
    if nbytes(least) > size:
        need = format_bytes(nbytes(least))
        raise ValueError(f"budget: expected at least {need} for the smallest memory ({least} frames), got {budget!r}")
    low, high = least, least + 1
    while nbytes(high) <= size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nbytes(middle) <= size else (low, middle)
    return low
