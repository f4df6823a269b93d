"""A memory for training, whose budget changes from batch to batch."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmemory.banks import MemoryConfig, MemoryTokens


class BudgetedMemory:
    """Makes memories for `attach` whose budget is drawn for each batch, and falls to its target at first.

    After a share p of the warm-up's steps a video of T frames meets a memory of T^(1 - p) · N^p entries in all, where N
    is the number of the target, times the factor that is drawn. Where the target gives entries' sizes, their sides fall
    from the frame's to the target's in the same way. Before the first step nothing is compressed. A video of fewer
    frames than N meets the target at once.

    What is drawn depends on the seed and the step alone, so it is the same on all devices and after a restart.

    Args:
        config: The memory at its target, of a policy without weights.
        warmup_steps: Steps of the warm-up.
        spread: Least and largest factor by which entries are multiplied, drawn on a logarithmic scale.
        seed: Of what is drawn.

    Attributes:
        progress: Share p of the warm-up.
        factor: The factor drawn for this batch.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        warmup_steps: int = 0,
        spread: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
    ) -> None:
        self.config, self.warmup_steps, self.spread, self.seed = config, warmup_steps, spread, seed
        self.settle()

    def settle(self) -> None:
        """Take the target's budget, as evaluation does."""
        self.progress, self.factor = 1.0, 1.0

    def draw(self, step: int, part: int = 0) -> None:
        """Draw the budget for a batch: the `part`-th one of an optimizer's step, both counted from 0."""
        low, high = (math.log(bound) for bound in self.spread)
        share = np.random.RandomState([self.seed, step, part]).rand()
        self.factor = math.exp(low + share * (high - low))
        self.progress = 1.0 if self.warmup_steps == 0 else min(1.0, step / self.warmup_steps)

    def __call__(
        self, *, dim: int, grid: tuple[int, int], key_dim: int | None, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """Return the memory for a video of the batch, which compresses and holds nothing."""
        return _Drawn(self.config, self.progress, self.factor, key_dim)


class _Drawn:
    def __init__(self, config: MemoryConfig, progress: float, factor: float, key_dim: int | None) -> None:
        self.config, self.progress, self.factor, self.key_dim = config, progress, factor, key_dim

    def compress(self, clip: Tensor, time: Tensor | None = None, *, mask: Tensor | None = None) -> MemoryTokens:
        T, H, W, D = clip.shape
        if self.progress == 0:
            # the last T frames of T, unchanged
            config = MemoryConfig(memory_policy="recent", memory_capacities=(T,))
        else:
            config = self._config(T, D, (H, W))
        memory = _planner(config, D, (H, W), self.key_dim, clip.dtype)
        made: MemoryTokens = memory.compress(clip, time, mask=mask)
        return made

    def _config(self, T: int, dim: int, grid: tuple[int, int]) -> MemoryConfig:
        target = _capacities(self.config, dim, grid)
        total = sum(target)
        entries, sizes = self.factor * total, self.config.memory_reduced_sizes
        if self.progress < 1 and entries < T:
            entries = T ** (1 - self.progress) * entries**self.progress
            sides = [min(max(grid), math.isqrt(size or max(grid) ** 2)) for size in sizes or ()]
            falling = tuple(round(max(grid) ** (1 - self.progress) * side**self.progress) ** 2 for side in sides)
            sizes = falling if sizes is not None else None
        scaled = tuple(max(1, round(capacity * entries / total)) if capacity else 0 for capacity in target)
        return replace(self.config, memory_capacities=scaled, memory_budget=None, memory_reduced_sizes=sizes)


@lru_cache(maxsize=64)
def _capacities(config: MemoryConfig, dim: int, grid: tuple[int, int]) -> tuple[int, ...]:
    """Return the entries of each tier."""
    if config.memory_capacities is not None:
        return config.memory_capacities
    memory: Any = config.build(dim, grid, device="meta")
    return tuple(memory.layout.capacities) if config.policy == "hierarchical" else (int(memory.capacity),)


@lru_cache(maxsize=64)
def _planner(config: MemoryConfig, dim: int, grid: tuple[int, int], key_dim: int | None, dtype: torch.dtype) -> Any:
    """Return a memory that only compresses; it is cached, because its layout is costly to compute."""
    return config.build(dim, grid, key_dim=key_dim, device="meta", dtype=dtype)
