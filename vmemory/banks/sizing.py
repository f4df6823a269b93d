"""How many bytes a bank of given capacities holds, without making it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vmemory.banks.bank import make_layout


def state_bytes(
    dim: int,
    grid: tuple[int, int],
    capacities: Sequence[int],
    grids: Sequence[tuple[int, int] | None],
    rule: str,
    intervals: Sequence[int] | None,
    streams: int,
    dtype: torch.dtype,
    key_dim: int | None,
) -> int:
    """`nbytes` of the bank that these arguments make."""
    layout, _ = make_layout(dim, grid, capacities, grids, rule, intervals, dim if key_dim is None else key_dim)
    state = sum(math.prod(shape) * kind.itemsize for shape, kind in layout.state_shapes(streams, dtype).values())
    wide = torch.promote_types(dtype, torch.float32)
    # the weight table and three int64 facts of each token row
    return state + layout.packed_maps.numel() * wide.itemsize + 3 * 8 * layout.rows
