"""Tiers of falling resolution: recent and distinct frames large, the rest small (VideoChat-Online)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vmemory.banks.bank import Bank
from vmemory.banks.layout import check_grid, largest_entries, state_bytes
from vmemory.banks.quantization import name_of
from vmemory.banks.registry import register_policy
from vmemory.ops._checks import check_choice

Grids = Sequence[tuple[int, int] | None]
HIERARCHICAL_RULES = ("paper", "videochat-online", "all-pairs")


@register_policy
class HierarchicalBank(Bank):
    """A memory in tiers of falling resolution: a full tier hands one of its most similar frames to the next.

    Rules:
        `"paper"`: the older of the closest time-adjacent pair leaves, demoted frames are area-pooled and inserted by
        time, every tier passes on what it evicts, the last drops it.
        `"videochat-online"`: the released code, quirks included: list-order adjacency, bilinear reduction, demoted
        frames appended, and what the second tier evicts is dropped instead of passed on.
        `"all-pairs"`: the VideoLLaMA3 port: the newer of the closest of all pairs leaves, cascade as above.

    Args:
        dim, grid, intervals, streams, device, dtype, key_dim, adapter: As in `Bank`.
        capacity: Entries per tier, first tier first; default (24, 24, 144).
        grid_size: Token grid per tier; default the frames' own grid, then half of the one before (at least 1).
        rule: One of the above.
        budget: `"64MiB"` or bytes instead of `capacity`: the most entries n whose `nbytes` stay within it, split
            n/8, n/8 and 3n/4 (or n/8 per tier and the rest last).

    Raises:
        ValueError: An argument does not fit, both `capacity` and `budget` are given, or the budget holds no frame.

    Source: VideoChat-Online (arXiv 2501.00584), section on the pyramid memory bank, and its released code.
    """

    policy = "hierarchical"

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: Sequence[int] | None = None,
        grid_size: Grids | None = None,
        rule: str = "paper",
        *,
        budget: str | int | None = None,
        intervals: Sequence[int] | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        key_dim: int | None = None,
        adapter: nn.Module | None = None,
    ) -> None:
        check_choice("rule", rule, HIERARCHICAL_RULES)
        if budget is not None and capacity is not None:
            raise ValueError("budget: expected either budget or capacity, got both")
        tiers = len(grid_size) if grid_size is not None else (3 if capacity is None else len(capacity))
        sizes = halving(grid, tiers) if grid_size is None else list(grid_size)
        if budget is not None:

            def nbytes(n: int) -> int:
                return state_bytes(dim, grid, split(n, tiers), sizes, rule, intervals, streams, dtype, key_dim)

            capacity = split(largest_entries(budget, tiers, nbytes), tiers)
        elif capacity is None:
            capacity = (24, 24, 144)
        super().__init__(
            dim, grid, capacity, sizes, rule, intervals=intervals, streams=streams, device=device, dtype=dtype,
            key_dim=key_dim, adapter=adapter,
        )  # fmt: skip
        self._config = {
            "dim": dim,
            "grid": list(grid),
            "capacity": list(capacity),
            "grid_size": [None if g is None else list(g) for g in sizes],
            "rule": rule,
            "intervals": None if intervals is None else list(intervals),
            "streams": streams,
            "dtype": name_of(dtype),
            "key_dim": self.layout.key_dim,
        }


def halving(grid: tuple[int, int], tiers: int) -> list[tuple[int, int]]:
    """Return the grid itself, then half of the one before, never below 1."""
    check_grid("grid", grid)
    sizes = [(int(grid[0]), int(grid[1]))]
    while len(sizes) < tiers:
        h, w = sizes[-1]
        sizes.append((max(1, h // 2), max(1, w // 2)))
    return sizes[:tiers]


def split(n: int, tiers: int) -> tuple[int, ...]:
    """Return n entries split over tiers: n/8 each (at least 1), the rest in the last; of three n/8, n/8, 3n/4."""
    upper = [max(1, n // 8)] * (tiers - 1)
    return (*upper, max(1, n - sum(upper)))
