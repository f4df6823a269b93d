"""Make a memory for the square token grids of the small encoders."""

from __future__ import annotations

import math
from typing import Any

import torch

from vmemory.banks import POLICIES, Memory, build_memory
from vmemory.banks.dual.state import split as working_and_episodic
from vmemory.banks.policies.hierarchical import split

# shown with every answer of such a memory
UNTRAINED = "nobody trained the dual memory here: it changes nothing, and both of its memories hold frames as they came"
_SEED = 0


def video_bank(
    policy: str,
    side: int,
    dim: int,
    *,
    rule: str | None = None,
    entries: int | None = None,
    budget: str | int | None = None,
    dtype: torch.dtype | str = torch.float16,
    keep: int | None = None,
) -> Memory:
    """Make a memory of one stream for tokens `[side, side, dim]`, by number of entries or by bytes.

    A hierarchical memory has three tiers of n/8, n/8 and 3n/4 entries. If 9 divides the side, their grids have the
    frame's sides, a third and a ninth of them, which keeps every frame's mean exact. A dual memory is untrained: its
    share α is 0, so its slots hold the frames unchanged.

    Args:
        policy: A key of `vmemory.banks.POLICIES`.
        side, dim: Tokens per side and channels of the frames.
        rule: Rule of a hierarchical or dual memory.
        entries, budget: Size; exactly one of them.
        dtype: Storage dtype of tokens.
        keep: Tokens per side of each entry, for memories with entries of one size; None = a third of the frame's if 3
            divides it (which keeps its mean exact), else the frame's.

    Raises:
        ValueError: The policy is unknown, does not support `rule` or `keep`, or has too few entries or bytes.
    """
    if policy not in POLICIES:
        raise ValueError(f"bank: expected one of {', '.join(POLICIES)}, got {policy!r}")
    tiers = {"hierarchical": 3, "dual": 2}.get(policy, 1)
    if entries is not None and entries < tiers:
        raise ValueError(f"entries: expected at least {tiers}, got {entries}")
    if rule is not None and tiers == 1:
        raise ValueError(f"rule: only the hierarchical bank and the dual one have rules, got {rule!r} for {policy!r}")
    if keep is not None and tiers > 1:
        raise ValueError(f"keep: the {policy} bank has sizes of its own, got {keep}")
    arguments: dict[str, Any] = {"dim": dim, "grid": (side, side), "dtype": dtype, "budget": budget}
    if policy == "dual":
        return _dual(arguments, entries, rule)
    if policy != "hierarchical":
        if keep is None:
            keep = side // 3 if side % 3 == 0 else side
        if not 1 <= keep <= side:
            raise ValueError(f"keep: expected 1 to {side} tokens a side, got {keep}")
        return build_memory(policy, capacity=entries, grid_size=None if keep == side else (keep, keep), **arguments)
    if side % 9 == 0:
        arguments["grid_size"] = ((side, side), (side // 3, side // 3), (side // 9, side // 9))
    capacity = None if entries is None else split(entries, 3)
    return build_memory(policy, capacity=capacity, rule=rule or "paper", **arguments)


def _dual(arguments: dict[str, Any], entries: int | None, rule: str | None) -> Memory:
    capacity = None if entries is None else working_and_episodic(entries)
    heads = math.gcd(arguments["dim"], 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        arguments |= {"capacity": capacity, "heads": heads, "rule": rule or "most-similar", "residual": True}
        return build_memory("dual", **arguments)
