"""Tiers as people write them, as the layout that kernels take; and what they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch

from vmemory.banks.quantized import new_state, storage_of
from vmemory.ops._checks import check_int
from vmemory.reference.bank_layout import BankLayout

# numbers in a layout's weight table: a line of 5,792 tokens, or frames of 256 × 256 in eight tiers
MOST_WEIGHTS = 2**25


@lru_cache(maxsize=64)
def clamped(layout: BankLayout, frames: int) -> BankLayout:
    """The layout with no tier larger than a clip of so many frames can fill: decides alike, allocates less."""
    capacities = tuple(min(c, max(frames, 1)) for c in layout.capacities)
    if capacities == layout.capacities:
        return layout
    return BankLayout(
        layout.grid, layout.dim, layout.key_dim, capacities, layout.grids, layout.rule, layout.intervals, layout.entries
    )


def check_grid(name: str, grid: Any) -> None:
    """A pair of ints, both at least 1.

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
    capacities: Sequence[int],
    grids: Sequence[tuple[int, int] | None],
    rule: str,
    intervals: Sequence[int] | None,
    key_dim: int,
) -> tuple[BankLayout, tuple[int, ...]]:
    """The tiers that exist, and the level (place in `capacities`) of each.

    Raises:
        ValueError: The tiers, grids or intervals do not fit each other.
    """
    check_grid("grid", grid)
    if len(capacities) != len(grids):
        raise ValueError(f"grids: expected one per capacity ({len(capacities)}), got {len(grids)}")
    for c in capacities:
        check_int("capacities", c, low=0)
    for g in grids:
        if g is not None:
            check_grid("grids", g)
    sizes = [(grid[0], grid[1]) if g is None else (int(g[0]), int(g[1])) for g in grids]
    for h, w in sizes:
        if not (1 <= h <= grid[0] and 1 <= w <= grid[1]):
            raise ValueError(f"grids: expected between (1, 1) and {tuple(grid)}, got {(h, w)}")
    weights = sum((i + 1) * (h * grid[0] + w * grid[1]) for i, (h, w) in enumerate(sizes))
    if weights > MOST_WEIGHTS:
        raise ValueError(f"grid: expected reductions of at most 2^25 weights, got {weights} for {tuple(grid)}")
    levels = tuple(i for i, c in enumerate(capacities) if c > 0)
    steps = tuple(intervals or ())
    if steps and len(steps) > len(capacities):
        raise ValueError(f"intervals: expected at most one per tier ({len(capacities)}), got {len(steps)}")
    for step in steps:
        check_int("intervals", step, low=1)
    entries = tuple(next((n for n, level in enumerate(levels) if level >= i), -1) for i in range(len(steps)))
    layout = BankLayout(
        (int(grid[0]), int(grid[1])),
        dim,
        key_dim,
        tuple(capacities[i] for i in levels),
        tuple(sizes[i] for i in levels),
        rule,
        steps,
        entries,
    )
    return layout, levels


def state_bytes(
    dim: int,
    grid: tuple[int, int],
    capacities: Sequence[int],
    grids: Sequence[tuple[int, int] | None],
    rule: str,
    intervals: Sequence[int] | None,
    streams: int,
    dtype: torch.dtype | str,
    key_dim: int | None,
) -> int:
    """`nbytes` of the bank that these arguments make."""
    layout, _ = make_layout(dim, grid, capacities, grids, rule, intervals, dim if key_dim is None else key_dim)
    wide = torch.promote_types(storage_of(dtype), torch.float32)
    held = sum(x.numel() * x.element_size() for x in new_state(layout, streams, "meta", dtype))
    # the weight table and three int64 facts of each token row
    return held + layout.packed_maps.numel() * wide.itemsize + 3 * 8 * layout.rows
