"""Settings of a model's memory, under the names that model configs and command lines use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from vmemory.banks.memory import Memory
from vmemory.banks.registry import POLICIES, build_memory
from vmemory.ops._checks import check_choice, check_int

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# settings by their names; of a model's config those that it has
ConfigLike: TypeAlias = "MemoryConfig | Mapping[str, object] | PretrainedConfig"

_STRATEGIES = {"similarity": "hierarchical", "uniform": "uniform", "random": "reservoir"}
# the memory of those who ask for none: how it reduces each side of a frame, to how many tokens at least, and the videos
# that are too short for it
DEFAULT_POLICY, DEFAULT_RATIO, LEAST_SIDE, SHORT_VIDEO = "merging", 3, 2, 24


@dataclass(frozen=True)
class MemoryConfig:
    """The settings of a memory in a model, read from and written to `model.config` under these names.

    Attributes:
        enable_memory_bank: Off leaves the model as it is until it is set; `use_memory_bank` is another name for it.
        memory_policy: A key of `vmemory.banks.POLICIES`. None = `"hierarchical"` where settings describe several tiers
            or a rule, else the default: `"merging"`, whose entries keep a third of a frame's tokens along each side,
            at least two where the frame has two, if no sizes are given.
        memory_rule: Of the hierarchical or the dual memory; None = its default.
        memory_capacities: Entries per tier, high-resolution tier first; (working, episodic) of the dual memory. One
            number for memories of one tier. None = (24, 24, 144), 192 entries, or (8, 32).
        memory_reduced_sizes: Tokens of a frame in each tier, square numbers or None; larger than the model's own grid
            means the grid as it is. None = the first tier as it is, each further one halved along both axes; a policy
            that is named and has one tier keeps frames as they are.
        memory_downsample_ratios: Instead of sizes, how many times smaller along each axis a tier's grid is: (1, 2, 4).
        memory_intervals: As in `HierarchicalBank`.
        memory_budget: `"64MiB"` or bytes instead of capacities.
        memory_similarity_threshold: The least cosine at which a search of the memory returns an entry.
        max_frames_before_compression: Videos of at most so many frames pass untouched. None = 24 where nothing says
            which memory it is to be, else 0.
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
    memory_policy: str | None = None
    memory_rule: str | None = None
    memory_capacities: tuple[int, ...] | None = None
    memory_reduced_sizes: tuple[int | None, ...] | None = None
    memory_downsample_ratios: tuple[int, ...] | None = None
    memory_intervals: tuple[int, ...] | None = None
    memory_budget: str | int | None = None
    memory_similarity_threshold: float | None = None
    max_frames_before_compression: int | None = None
    memory_chunk_frames: int | None = None
    memory_full_logits: bool = True
    # told apart by equality alone
    memory_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.memory_policy is not None:
            check_choice("memory_policy", self.memory_policy, tuple(POLICIES))
        if self.max_frames_before_compression is not None:
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
    def from_dict(cls, settings: ConfigLike | None, **changes: Any) -> MemoryConfig:
        """Read a config from a dict, or from the attributes of these names of a model's config.

        Args:
            settings: None = the defaults.
            changes: Settings that are to be others.

        Raises:
            ValueError: A dict's key is not a setting, or a value does not fit.
        """
        if isinstance(settings, cls):
            return replace(settings, **_plain(changes)) if changes else settings
        if isinstance(settings, Mapping):
            known = dict(settings)
        else:
            known = {name: getattr(settings, name) for name in _names() if hasattr(settings, name)}
        return cls(**_plain({**known, **changes}))

    @property
    def policy(self) -> str:
        """The policy that is named, or that the settings ask for."""
        if self.memory_policy is not None:
            return self.memory_policy
        lists = (
            self.memory_capacities, self.memory_reduced_sizes, self.memory_downsample_ratios, self.memory_intervals,
        )  # fmt: skip
        tiers = self.memory_rule is not None or any(len(values or ()) > 1 for values in lists)
        return "hierarchical" if tiers else DEFAULT_POLICY

    def short_video(self, given: bool = False) -> int:
        """Return the frames up to which a video passes untouched; `given`: the memory is not made from this config."""
        if self.max_frames_before_compression is not None:
            return self.max_frames_before_compression
        if given:
            return 0
        said = (
            self.memory_policy, self.memory_rule, self.memory_capacities, self.memory_reduced_sizes,
            self.memory_downsample_ratios, self.memory_intervals, self.memory_budget, self.memory_options or None,
        )  # fmt: skip
        return SHORT_VIDEO if all(value is None for value in said) else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not defaults, as plain values."""
        default = asdict(MemoryConfig())
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
        return {"enable_memory_bank": self.enable_memory_bank, **listed}

    def build(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        key_dim: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        streams: int = 1,
    ) -> Memory:
        """Make the memory for frames of a grid; on the `"meta"` device one that only compresses and holds nothing.

        Raises:
            ValueError: The settings do not fit the policy or the grid; the message names the argument.
        """
        arguments: dict[str, Any] = {"streams": streams, "device": device, "dtype": dtype, "key_dim": key_dim}
        policy = self.policy
        if policy == "dual":
            # an untrained dual memory must not change what the model says
            arguments["residual"] = True
        arguments |= self.memory_options
        tiered = policy == "hierarchical"
        several = tiered or policy == "dual"
        if self.memory_rule is not None:
            arguments["rule"] = self.memory_rule
        if self.memory_budget is not None:
            arguments["budget"] = self.memory_budget
        elif self.memory_capacities is not None:
            arguments["capacity"] = self.memory_capacities if several else sum(self.memory_capacities)
        elif not several:
            arguments["capacity"] = 192
        sizes = self._grid_sizes(grid)
        if sizes is not None:
            if tiered:
                arguments["grid_size"] = sizes
            elif not several:
                arguments["grid_size"] = sizes[0]
        if self.memory_intervals is not None:
            arguments["intervals"] = self.memory_intervals
        return build_memory(policy, dim=dim, grid=grid, **arguments)

    def _grid_sizes(self, grid: tuple[int, int]) -> list[tuple[int, int] | None] | None:
        if self.memory_reduced_sizes is not None:
            return [_side(size, grid) for size in self.memory_reduced_sizes]
        ratios = self.memory_downsample_ratios
        if ratios is None and self.memory_policy is None and self.policy == DEFAULT_POLICY:
            height, width = (max(side // DEFAULT_RATIO, min(side, LEAST_SIDE)) for side in grid)
            return [(height, width)]
        return None if ratios is None else [(max(grid[0] // ratio, 1), max(grid[1] // ratio, 1)) for ratio in ratios]


def _side(tokens: int | None, grid: tuple[int, int]) -> tuple[int, int] | None:
    if tokens is None or tokens >= grid[0] * grid[1]:
        return None
    side = math.isqrt(tokens)
    return min(side, grid[0]), min(side, grid[1])


def _names() -> tuple[str, ...]:
    return (*(f.name for f in fields(MemoryConfig)), "use_memory_bank", "compression_strategy")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under their own names, with lists and single numbers as tuples."""
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
        settings.setdefault("memory_policy", _STRATEGIES[strategy])
    for name in ("memory_capacities", "memory_reduced_sizes", "memory_downsample_ratios", "memory_intervals"):
        value = settings.get(name)
        if value is not None:
            settings[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return settings
