"""Cells of an evaluation: a memory of a policy, at a size that is given in tokens, as a share or in bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vmemory.banks import POLICIES, Memory, MemoryConfig, RecentBank
from vmemory.banks.dual.state import split as working_and_episodic
from vmemory.banks.layout import parse_bytes

# the cell that holds every frame, and the policy name of the memory of those who ask for none
UNCOMPRESSED, DEFAULT = "uncompressed", "default"


@dataclass(frozen=True)
class Cell:
    """A memory to evaluate: settings and a size.

    Attributes:
        name: As in tables; unique in an evaluation.
        config: The settings; None = every frame is held.
        budget: The size: `"96"` visual tokens, `"25%"` of the tokens of all frames, or bytes such as `"64KiB"`; None =
            that of the settings.
    """

    name: str
    config: MemoryConfig | None
    budget: str | None = None

    def memory(self, frames: int, *, dim: int, grid: tuple[int, int], **like: Any) -> Memory:
        """Make the memory for a stream.

        Args:
            frames: Largest number of frames `grid` of the stream.
            dim, grid, like: As in `MemoryConfig.build`.

        Raises:
            ValueError: The size holds no entry.
        """
        if self.config is None:
            return RecentBank(dim, grid, frames, **like)
        config = self.config
        if self.budget is not None and is_bytes(self.budget):
            config = replace(config, memory_capacities=None, memory_budget=self.budget)
        elif self.budget is not None:
            config = sized(config, grid, token_budget(self.budget, frames * grid[0] * grid[1]))
        return config.build(dim, grid, **like)


def cells_of(policies: Sequence[str], budgets: Sequence[str]) -> list[Cell]:
    """Make the cells of all policies at all budgets, behind the uncompressed one.

    Args:
        policies: Names in `vmemory.banks.POLICIES`, `"default"`, or JSON files with the settings of a `MemoryConfig`.
            A file that states its own size is one cell.
        budgets: As in `Cell`.

    Raises:
        ValueError: An unknown policy, a file that cannot be used, or a budget of another form; the message names it.
    """
    if not policies:
        raise ValueError("policies: expected at least one, got none")
    for budget in budgets:
        check_budget(budget)
    cells = [Cell(UNCOMPRESSED, None)]
    for policy in policies:
        config = config_of(policy)
        name = Path(policy).stem if policy.endswith(".json") else policy
        if config.memory_capacities is not None or config.memory_budget is not None:
            cells.append(Cell(name, config))
            continue
        if not budgets:
            raise ValueError(f"budgets: expected at least one for {name!r}, got none")
        cells += [Cell(f"{name}@{budget}", config, budget) for budget in budgets]
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"policies: expected each once, got {twice!r} twice")
    return cells


def config_of(policy: str) -> MemoryConfig:
    """Return the settings of a policy's name, of `"default"`, or of a JSON file.

    Raises:
        ValueError: There is no such policy, or the file cannot be used.
    """
    if policy == DEFAULT:
        return MemoryConfig()
    if policy.endswith(".json"):
        return read_config(Path(policy))
    if policy not in POLICIES:
        known = ", ".join([*POLICIES, DEFAULT])
        raise ValueError(f"policies: expected one of {known}, or a .json file with settings, got {policy!r}")
    return MemoryConfig(memory_policy=policy)


def read_config(path: Path) -> MemoryConfig:
    """Read the settings of a memory from a JSON file.

    Raises:
        ValueError: The file does not exist or does not hold settings.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected an object of settings, got {type(loaded).__name__}")
    try:
        return MemoryConfig.from_dict(loaded)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def check_budget(budget: str) -> None:
    """Check a size: tokens, a percentage or bytes.

    Raises:
        ValueError: Another form, or not a positive number.
    """
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", budget)
    if share is not None:
        if not 0 < float(share[1]) <= 100:
            raise ValueError(f"budgets: expected more than 0% and at most 100%, got {budget!r}")
    elif is_bytes(budget):
        parse_bytes(budget)
    elif not re.fullmatch(r"\d+", budget) or int(budget) < 1:
        raise ValueError(f"budgets: expected tokens ('96'), a share ('25%') or bytes ('64KiB'), got {budget!r}")


def token_budget(budget: str, whole: int) -> int:
    """Return the tokens of a budget in tokens or as a share of `whole` tokens."""
    return int(float(budget[:-1]) / 100 * whole + 1e-9) if budget.endswith("%") else int(budget)


def is_bytes(budget: str) -> bool:
    """Return whether a budget is in bytes."""
    return re.fullmatch(r"[\d.]+\s*[KMGT]?i?B", budget, re.IGNORECASE) is not None


def sized(config: MemoryConfig, grid: tuple[int, int], tokens: int) -> MemoryConfig:
    """Return settings whose memory holds at most `tokens` visual tokens of frames `grid`.

    A memory of several sizes has half of the tokens in its first tier and shares the rest among the others.

    Args:
        config: Settings without a size.
        grid: Tokens (H, W) of a frame.
        tokens: The budget.

    Raises:
        ValueError: Not one entry of each size fits.
    """
    if config.policy == "hierarchical":
        # frames of few tokens have few sizes
        most = 3 if min(grid) >= 4 else 2
        count = len(config.memory_reduced_sizes or config.memory_downsample_ratios or ()) or most
    else:
        count = 2 if config.policy == "dual" else 1
    probe = replace(config, memory_capacities=(1,) * count).build(8, grid, device=torch.device("meta"))
    sizes = [math.prod(tier.grid) for tier in probe.tiers]
    if config.policy == "dual":
        entries = tokens // sizes[0]
        capacities: tuple[int, ...] = working_and_episodic(entries) if entries >= 2 else (0, 0)
    else:
        shares = [tokens] if count == 1 else [tokens // 2, *[(tokens - tokens // 2) // (count - 1)] * (count - 1)]
        capacities = tuple(share // size for share, size in zip(shares, sizes, strict=True))
    if min(capacities) < 1:
        raise ValueError(f"budgets: expected enough tokens for entries of {sizes} tokens, got {tokens}")
    return replace(config, memory_capacities=capacities)
