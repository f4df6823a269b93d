"""Make the layout of a bank from capacities, grids and a budget in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch

from vmemory.banks.quantization import new_state, storage_of
from vmemory.ops._checks import check_int
from vmemory.reference.bank_layout import BankLayout

# numbers in a layout's weight table: a line of 5,792 tokens, or frames of 256 × 256 in eight tiers
MOST_WEIGHTS = 2**25
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_BYTES = 2**63


@lru_cache(maxsize=64)
def clamped(layout: BankLayout, frames: int) -> BankLayout:
    """Return the layout with each tier cut to the frames of a clip: it decides alike and allocates less."""
    capacities = tuple(min(c, max(frames, 1)) for c in layout.capacities)
    if capacities == layout.capacities:
        return layout
    return BankLayout(
        layout.grid, layout.dim, layout.key_dim, capacities, layout.grids, layout.rule, layout.intervals, layout.entries
    )


def check_grid(name: str, grid: Any) -> None:
    """Check that a grid is a pair of ints, both at least 1.

    Raises:
        TypeError, ValueError: Something else.
    """
    if not isinstance(grid, Sequence) or not all(isinstance(side, Integral) for side in grid):
        raise TypeError(f"{name}: expected two ints (H, W), got {grid!r}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"{name}: expected (H, W), both at least 1, got {grid!r}")


def make_layout(
    dim: int,
    grid: tuple[int, int],
    capacity: Sequence[int],
    grid_size: Sequence[tuple[int, int] | None],
    rule: str,
    intervals: Sequence[int] | None,
    key_dim: int,
) -> tuple[BankLayout, tuple[int, ...]]:
    """Return the layout of the tiers that exist, and the level (place in `capacity`) of each.

    Raises:
        ValueError: The tiers, grids or intervals do not fit each other.
    """
    check_grid("grid", grid)
    if len(capacity) != len(grid_size):
        raise ValueError(f"grid_size: expected one per capacity ({len(capacity)}), got {len(grid_size)}")
    for c in capacity:
        check_int("capacity", c, low=0)
    for g in grid_size:
        if g is not None:
            check_grid("grid_size", g)
    sizes = [(grid[0], grid[1]) if g is None else (int(g[0]), int(g[1])) for g in grid_size]
    for h, w in sizes:
        if not (1 <= h <= grid[0] and 1 <= w <= grid[1]):
            raise ValueError(f"grid_size: expected between (1, 1) and {tuple(grid)}, got {(h, w)}")
    weights = sum((i + 1) * (h * grid[0] + w * grid[1]) for i, (h, w) in enumerate(sizes))
    if weights > MOST_WEIGHTS:
        raise ValueError(f"grid: expected reductions of at most 2^25 weights, got {weights} for {tuple(grid)}")
    levels = tuple(i for i, c in enumerate(capacity) if c > 0)
    steps = tuple(intervals or ())
    if steps and len(steps) > len(capacity):
        raise ValueError(f"intervals: expected at most one per tier ({len(capacity)}), got {len(steps)}")
    for step in steps:
        check_int("intervals", step, low=1)
    entries = tuple(next((n for n, level in enumerate(levels) if level >= i), -1) for i in range(len(steps)))
    layout = BankLayout(
        (int(grid[0]), int(grid[1])),
        dim,
        key_dim,
        tuple(capacity[i] for i in levels),
        tuple(sizes[i] for i in levels),
        rule,
        steps,
        entries,
    )
    return layout, levels


def state_bytes(
    dim: int,
    grid: tuple[int, int],
    capacity: Sequence[int],
    grid_size: Sequence[tuple[int, int] | None],
    rule: str,
    intervals: Sequence[int] | None,
    streams: int,
    dtype: torch.dtype | str,
    key_dim: int | None,
) -> int:
    """Return `nbytes` of the bank that these arguments make."""
    layout, _ = make_layout(dim, grid, capacity, grid_size, rule, intervals, dim if key_dim is None else key_dim)
    wide = torch.promote_types(storage_of(dtype), torch.float32)
    held = sum(x.numel() * x.element_size() for x in new_state(layout, streams, "meta", dtype))
    # the weight table and three int64 facts of each token row
    return held + layout.packed_maps.numel() * wide.itemsize + 3 * 8 * layout.rows


def parse_bytes(budget: str | int) -> int:
    """Return a size such as `"64MiB"`, `"1.5 GB"` or a number of bytes as an int.

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
        size = int(exact) if math.isfinite(exact) else _MOST_BYTES
    if not 0 < size < _MOST_BYTES:
        raise ValueError(f"budget: expected a positive size below 2^63 bytes, got {budget!r}")
    return size


def format_bytes(size: float) -> str:
    """Return a number of bytes as text: `67108864` is `"64.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def largest_entries(budget: str | int, least: int, nbytes: Callable[[int], int]) -> int:
    """Return the largest number of entries n >= `least` with `nbytes(n)` within the budget; `nbytes` grows with n.

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
