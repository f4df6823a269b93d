"""A memory for the square token grids of the small encoders."""

from __future__ import annotations

from typing import Any

import torch

from vmemory.banks import Bank, make
from vmemory.banks.hierarchical import split

POLICIES = ("hierarchical", "merging", "episodic", "uniform", "reservoir", "recent")


def video_bank(
    policy: str,
    side: int,
    dim: int,
    *,
    rule: str | None = None,
    entries: int | None = None,
    budget: str | int | None = None,
    dtype: torch.dtype | str = torch.float16,
) -> Bank:
    """A memory of one stream for tokens `[side, side, dim]`, by number of entries or by bytes.

    A hierarchical memory has three tiers, n/8, n/8 and 3n/4 entries; where 9 divides the side their grids are the
    frame's, a third and a ninth of its sides, which keeps every frame's mean exact.

    Raises:
        ValueError: No such policy, a rule for a memory without rules, too few entries or bytes.
    """
    if policy not in POLICIES:
        raise ValueError(f"bank: expected one of {', '.join(POLICIES)}, got {policy!r}")
    tiers = 3 if policy == "hierarchical" else 1
    if entries is not None and entries < tiers:
        raise ValueError(f"entries: expected at least {tiers}, got {entries}")
    arguments: dict[str, Any] = {"dim": dim, "grid": (side, side), "dtype": dtype, "budget": budget}
    if policy != "hierarchical":
        if rule is not None:
            raise ValueError(f"rule: only the hierarchical bank has rules, got {rule!r} for {policy!r}")
        return make(policy, capacity=entries, **arguments)
    if side % 9 == 0:
        arguments["grids"] = ((side, side), (side // 3, side // 3), (side // 9, side // 9))
    capacities = None if entries is None else split(entries, 3)
    return make(policy, capacities=capacities, rule=rule or "paper", **arguments)
