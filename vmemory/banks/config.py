"""Which memory a model gets, in the names that model configs and command lines use for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import torch

from vmemory.banks.policies import POLICIES, make
from vmemory.ops._checks import check_choice, check_int

_STRATEGIES = {"similarity": None, "uniform": "uniform", "random": "reservoir"}


@dataclass(frozen=True)
class MemoryConfig:
    """The settings of a memory in a model, read from and written to `model.config` under these names.

    Attributes:
        enable_memory_bank: Off leaves the model as it is until it is set; `use_memory_bank` is another name for it.
        memory_policy: A key of `vmemory.banks.POLICIES`.
        memory_rule: Of the hierarchical or the dual memory; None = its default.
        memory_capacities: Entries per tier, high-resolution tier first; (working, episodic) of the dual memory. One
            number for memories of one tier. None = (24, 24, 144), 192 entries, or (8, 32).
        memory_reduced_sizes: Tokens of a frame in each tier, square numbers or None; larger than the model's own grid
            means the grid as it is. None = the first tier as it is, each further one halved along both axes.
        memory_downsample_ratios: Instead of sizes, how many times smaller along each axis a tier's grid is: (1, 2, 4).
        memory_intervals: As in `HierarchicalBank`.
        memory_budget: `"64MiB"` or bytes instead of capacities.
        memory_similarity_threshold: The least cosine at which a search of the memory returns an entry.
        max_frames_before_compression: Videos of at most so many frames pass untouched.
        memory_chunk_frames: Frames the tower encodes at a time, so that its peak does not grow with the video; None =
            all at once, which is what the model itself does to the bit.
        memory_full_logits: `forward` gives logits `[B, L, V]` at the caller's tokens, so that they stand beside the
            caller's ids and labels; a token that went has those of the last one before it. Off gives those that the
            model computes, fewer, and saves the bytes of the copy where only the loss is looked at.
        compression_strategy: `"similarity"`, `"uniform"` or `"random"`: the policy, where `memory_policy` is not set.
        memory_options: Further arguments of the policy's class; the dual memory is `residual` where they do not say.

    Source: the configuration of the VideoLLaMA3 memory bank port.
    """

    enable_memory_bank: bool = True
    memory_policy: str = "hierarchical"
    memory_rule: str | None = None
    memory_capacities: tuple[int, ...] | None = None
    memory_reduced_sizes: tuple[int | None, ...] | None = None
    memory_downsample_ratios: tuple[int, ...] | None = None
    memory_intervals: tuple[int, ...] | None = None
    memory_budget: str | int | None = None
    memory_similarity_threshold: float | None = None
    max_frames_before_compression: int = 0
    memory_chunk_frames: int | None = None
    memory_full_logits: bool = True
    # told apart by equality alone
    memory_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("memory_policy", self.memory_policy, tuple(POLICIES))
        check_int("max_frames_before_compression", self.max_frames_before_compression, low=0)
        if self.memory_chunk_frames is not None:
            check_int("memory_chunk_frames", self.memory_chunk_frames, low=1)
        for size in self.memory_reduced_sizes or ():
            if size is not None and (size < 1 or math.isqrt(size) ** 2 != size):
                raise ValueError(f"memory_reduced_sizes: expected square numbers of tokens, got {size}")
        for ratio in self.memory_downsample_ratios or ():
            check_int("memory_downsample_ratios", ratio, low=1)
        if self.memory_reduced_sizes is not None and self.memory_downsample_ratios is not None:
            raise ValueError("memory_downsample_ratios: expected either ratios or memory_reduced_sizes, got both")
        threshold = self.memory_similarity_threshold
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"memory_similarity_threshold: expected a cosine between -1 and 1, got {threshold}")
        if self.memory_capacities is not None and self.memory_budget is not None:
            raise ValueError("memory_budget: expected either memory_capacities or memory_budget, got both")

    @classmethod
    def of(cls, settings: Any) -> MemoryConfig:
        """A config from a dict, or from any object's attributes of these names; None = the defaults.

        Raises:
            ValueError: A dict's key is not a setting, or a value does not fit.
        """
        if isinstance(settings, cls):
            return settings
        if settings is None:
            return cls()
        if isinstance(settings, Mapping):
            known = dict(settings)
        else:
            known = {name: getattr(settings, name) for name in _names() if hasattr(settings, name)}
        return cls(**_plain(known))

    def written(self) -> dict[str, Any]:
        """The settings that are not defaults, as plain values."""
        default = asdict(MemoryConfig())
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
        return {"enable_memory_bank": self.enable_memory_bank, **listed}

    def make(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        key_dim: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        streams: int = 1,
    ) -> Any:
        """The memory for frames of a grid; on the `"meta"` device one that only compresses and holds nothing.

        Raises:
            ValueError: The settings do not fit the policy or the grid; the message names the argument.
        """
        arguments: dict[str, Any] = {"streams": streams, "device": device, "dtype": dtype, "key_dim": key_dim}
        if self.memory_policy == "dual":
            # a model with a memory that nobody trained is to be the model
            arguments["residual"] = True
        arguments |= self.memory_options
        tiered = self.memory_policy == "hierarchical"
        several = tiered or self.memory_policy == "dual"
        if self.memory_rule is not None:
            arguments["rule"] = self.memory_rule
        if self.memory_budget is not None:
            arguments["budget"] = self.memory_budget
        elif self.memory_capacities is not None:
            arguments["capacities" if several else "capacity"] = (
                self.memory_capacities if several else sum(self.memory_capacities)
            )
        elif not several:
            arguments["capacity"] = 192
        sizes = self._grids(grid)
        if sizes is not None:
            if tiered:
                arguments["grids"] = sizes
            elif not several:
                arguments["pooled"] = sizes[0]
        if self.memory_intervals is not None:
            arguments["intervals"] = self.memory_intervals
        return make(self.memory_policy, dim=dim, grid=grid, **arguments)

    def _grids(self, grid: tuple[int, int]) -> list[tuple[int, int] | None] | None:
        if self.memory_reduced_sizes is not None:
            return [_side(size, grid) for size in self.memory_reduced_sizes]
        if self.memory_downsample_ratios is not None:
            return [(max(grid[0] // ratio, 1), max(grid[1] // ratio, 1)) for ratio in self.memory_downsample_ratios]
        return None


def _side(tokens: int | None, grid: tuple[int, int]) -> tuple[int, int] | None:
    if tokens is None or tokens >= grid[0] * grid[1]:
        return None
    side = math.isqrt(tokens)
    return min(side, grid[0]), min(side, grid[1])


def _names() -> tuple[str, ...]:
    return (*(f.name for f in fields(MemoryConfig)), "use_memory_bank", "compression_strategy")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Other names resolved, lists as tuples, one number as a tuple."""
    for name in settings:
        if name not in _names():
            close = get_close_matches(name, _names(), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"config: expected settings out of {', '.join(_names())}, got {name!r}{hint}")
    if "use_memory_bank" in settings:
        settings.setdefault("enable_memory_bank", settings.pop("use_memory_bank"))
        settings.pop("use_memory_bank", None)
    strategy = settings.pop("compression_strategy", None)
    if strategy is not None:
        check_choice("compression_strategy", strategy, tuple(_STRATEGIES))
        if _STRATEGIES[strategy] is not None:
            settings.setdefault("memory_policy", _STRATEGIES[strategy])
    for name in ("memory_capacities", "memory_reduced_sizes", "memory_downsample_ratios", "memory_intervals"):
        value = settings.get(name)
        if value is not None:
            settings[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return settings
