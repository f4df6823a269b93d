"""Geometry of a tiered memory: rules, tiers, pooling maps and the shapes of its state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# kernels receive a choice and a victim as positions in these tuples
CHOICES = ("adjacent", "all", "gap", "oldest")
VICTIMS = ("older", "newer", "both")


@dataclass(frozen=True)
class Rule:
    """The choice of a victim in a full tier, and its fate. The incoming frame never takes part in the choice.

    Attributes:
        choose: Criterion for the victim: the closest `"adjacent"` pair of the list, the closest of `"all"` pairs, the
            smallest `"gap"` that its removal leaves, or the `"oldest"`.
        victim: The member of the closest pair that leaves, `"older"` or `"newer"` in list order; `"both"` merges them.
        by_time: Insert demoted frames by time; otherwise append them.
        cascade: Demote through all tiers; otherwise drop the victim of the second tier.
        demote: Pooling of demoted tokens, `"area"` or `"bilinear"`.
        nan_first: A frame with a non-finite descriptor leaves before any other.
    """

    choose: str
    victim: str = "older"
    by_time: bool = True
    cascade: bool = True
    demote: str = "area"
    nan_first: bool = True

    @property
    def numbers(self) -> list[int]:
        """Return the rule as operators take it: choose, victim, by_time, cascade, nan_first."""
        chosen = CHOICES.index(self.choose), VICTIMS.index(self.victim)
        return [*chosen, int(self.by_time), int(self.cascade), int(self.nan_first)]


RULES: dict[str, Rule] = {
    "paper": Rule("adjacent"),
    "videochat-online": Rule("adjacent", by_time=False, cascade=False, demote="bilinear", nan_first=False),
    "all-pairs": Rule("all", victim="newer", by_time=False, cascade=False, demote="bilinear"),
    "merge": Rule("adjacent", victim="both"),
    "uniform": Rule("gap"),
    "recent": Rule("oldest"),
}

MAX_TIERS = 8
# columns of BankState.entry, .clock and .counter
FRAME, FIRST, LAST, FRAMES = range(4)
TIME, START, STOP, MASS = range(4)
SEEN, SKIPPED, DROPPED, LENGTH = range(4)
# columns of a step: these, then the slot that each tier gives up, then the target of each such slot
STEP_TIER, STEP_FRESH, STEP_MERGED, STEP_HEAD = range(4)


class BankState(NamedTuple):
    """The state of a memory as device tensors of fixed shape (see `BankLayout.state_shapes`).

    slots `[S, L, D]` tokens; mass `[S, L]` float32 source cells each token stands for, 0 = no token there;
    descriptor `[S, M, R, K]` frame means; norm `[S, M, R]`; link `[S, P]` cosines of list neighbours;
    entry `[S, M, 4]` int64 (frame, first, last, frames merged; −1 = free); clock `[S, M, 4]` float64 (time, start,
    stop in seconds, mass); order `[S, M]` int64 slots in list order, tier by tier; counter `[S, 3 + tiers]` int64
    (seen, skipped, dropped, then entries per tier).

    Tokens in 8 or 4 bits: slots are int8 `[S, L, D]` or uint8 `[S, L, ceil(D / 2)]` with two channels a byte, and a
    token is its values times its scale, `[S, L]` float32. Scale is `[S, 0]` where tokens are floating.
    """

    slots: Tensor
    mass: Tensor
    descriptor: Tensor
    norm: Tensor
    link: Tensor
    entry: Tensor
    clock: Tensor
    order: Tensor
    counter: Tensor
    scale: Tensor

    @property
    def quantized(self) -> bool:
        """True if tokens are stored in 8 or 4 bits."""
        return not self.slots.dtype.is_floating_point


class Step(NamedTuple):
    """The decision for the next frame of each stream, before it is applied.

    tier `[S]` int64: the tier that the frame enters, −1 = none. fresh `[S]`: the frame's slot. merged `[S]`: the slot
    that the only victim is merged into. leaves `[S, tiers]`: the slot that each tier gives up. target `[S, tiers]`: its
    new slot in the next tier. −1 = none: a victim without a target leaves the memory, or is the newer one of a merge.
    """

    tier: Tensor
    fresh: Tensor
    merged: Tensor
    leaves: Tensor
    target: Tensor

    def evicted(self) -> Tensor:
        """Return the slot `[S]` int64 that no longer holds an entry of its own, −1 = none; of two merged the newer."""
        # at most one tier of a stream lets an entry go
        out = torch.where(self.target < 0, self.leaves, -1)
        return out.amax(1) if out.shape[1] else torch.full_like(self.tier, -1)


def axis_map(n: int, m: int, mode: str) -> Tensor:
    """Return weights `[m, n]` float64 that pool n cells to m along one axis; rows sum to 1.

    `"area"` has `adaptive_avg_pool2d`'s windows, `"bilinear"` the taps of `interpolate(align_corners=False)`.
    """
    weights = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        if mode == "area":
            begin, end = i * n // m, -((-(i + 1) * n) // m)
            weights[i, begin:end] = 1.0 / (end - begin)
        else:
            at = max((i + 0.5) * n / m - 0.5, 0.0)
            low = min(int(at), n - 1)
            weights[i, low] += 1.0 - (at - low)
            weights[i, min(low + 1, n - 1)] += at - low
    return weights


@dataclass(frozen=True)
class BankLayout:
    """Tiers that exist (capacity at least 1), first to last, for frames `[*grid, dim]`.

    Attributes:
        grid: Token grid (H, W) of the incoming frames.
        dim: Channels D.
        key_dim: Number of leading channels K of D that similarity uses.
        capacities: Slots of each tier.
        grids: Token grid of each tier.
        rule: A key of `RULES`.
        intervals: Frame t enters the first original tier whose interval divides t; empty = all enter the first.
        entries: For each interval, the tier that its frames enter here, −1 = they leave at once.
    """

    grid: tuple[int, int]
    dim: int
    key_dim: int
    capacities: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    rule: str = "paper"
    intervals: tuple[int, ...] = ()
    entries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(map(repr, RULES))}, got {self.rule!r}")
        if not 0 <= self.tiers <= MAX_TIERS:
            raise ValueError(f"capacities: expected at most {MAX_TIERS} tiers, got {self.tiers}")
        if RULES[self.rule].victim == "both" and self.tiers > 1:
            raise ValueError(f"capacities: rule {self.rule!r} has one tier, got {self.tiers}")
        # computed here, because a compiler that traces a push cannot enter the lock of a cached property
        self.kernel_args, self.pooled_cells  # noqa: B018

    @property
    def tiers(self) -> int:
        return len(self.capacities)

    @property
    def slots(self) -> int:
        """M, the number of slots."""
        return sum(self.capacities)

    @cached_property
    def first_slot(self) -> tuple[int, ...]:
        return tuple(sum(self.capacities[:tier]) for tier in range(self.tiers))

    @cached_property
    def cells(self) -> tuple[int, ...]:
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def first_row(self) -> tuple[int, ...]:
        rows = [c * n for c, n in zip(self.capacities, self.cells, strict=True)]
        return tuple(sum(rows[:tier]) for tier in range(self.tiers))

    @property
    def rows(self) -> int:
        """L, the number of token rows."""
        return sum(c * n for c, n in zip(self.capacities, self.cells, strict=True))

    @property
    def links(self) -> int:
        """P: one cosine for each list place, or for each pair of slots of a tier."""
        return sum(c * c for c in self.capacities) if RULES[self.rule].choose == "all" else self.slots

    @cached_property
    def first_link(self) -> tuple[int, ...]:
        square = RULES[self.rule].choose == "all"
        sizes = [c * c if square else c for c in self.capacities]
        return tuple(sum(sizes[:tier]) for tier in range(self.tiers))

    @cached_property
    def tier_of(self) -> tuple[int, ...]:
        """Tier of each slot."""
        return tuple(tier for tier, capacity in enumerate(self.capacities) for _ in range(capacity))

    def row_of(self, slot: int) -> int:
        """Return the first token row of a slot."""
        tier = self.tier_of[slot]
        return self.first_row[tier] + (slot - self.first_slot[tier]) * self.cells[tier]

    def entry_tier(self, frame: int) -> int:
        """Return the tier that a frame number enters, −1 = none."""
        if not self.intervals:
            return 0 if self.tiers else -1
        for interval, tier in zip(self.intervals, self.entries, strict=True):
            if frame % interval == 0:
                return tier
        return -1

    @cached_property
    def entered(self) -> tuple[int, ...]:
        """Tiers that frames can enter from outside."""
        return (
            tuple(sorted({t for t in self.entries if t >= 0})) if self.intervals else tuple(range(min(self.tiers, 1)))
        )

    @cached_property
    def left(self) -> tuple[int, ...]:
        """Tiers that entries leave the memory from."""
        last = self.tiers - 1
        return tuple(sorted({last if RULES[self.rule].cascade else min(tier + 1, last) for tier in self.entered}))

    def maps(self, source: int, tier: int) -> tuple[Tensor, Tensor]:
        """Return row and column weights that pool an input frame, entered at tier `source`, to `tier`'s grid."""
        composed = []
        for axis in (0, 1):
            weights = axis_map(self.grid[axis], self.grids[source][axis], "area")
            for below in range(source, tier):
                weights = self.step(below, axis) @ weights
            composed.append(weights)
        return composed[0], composed[1]

    def step(self, tier: int, axis: int) -> Tensor:
        """Return the weights that pool `tier`'s grid to the next tier's, along one axis."""
        return axis_map(self.grids[tier][axis], self.grids[tier + 1][axis], RULES[self.rule].demote)

    @cached_property
    def descriptors(self) -> int:
        """R: 1 for one tier or if every reduction preserves a frame's mean, otherwise one descriptor per tier."""
        for source in self.entered:
            for tier in range(source, self.tiers):
                for weights in self.maps(source, tier):
                    share = weights.mean(0)
                    if not torch.allclose(share, torch.full_like(share, 1.0 / share.numel()), atol=1e-9, rtol=0):
                        return self.tiers
        return 1

    @cached_property
    def packed_maps(self) -> Tensor:
        """Return all weights in one float64 table, as the kernels read it.

        For each source <= tier the composed row and column weights, then for each tier but the last its step.
        """
        parts = [m for a in range(self.tiers) for b in range(a, self.tiers) for m in self.maps(a, b)]
        parts += [self.step(tier, axis) for tier in range(self.tiers - 1) for axis in (0, 1)]
        return torch.cat([m.flatten() for m in parts]) if parts else torch.zeros(0, dtype=torch.float64)

    @cached_property
    def kernel_args(self) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Return capacities, grids, intervals, entries and rule as operators take them."""
        grids = [side for grid in self.grids for side in grid]
        numbers = RULES[self.rule].numbers
        return list(self.capacities), grids, list(self.intervals), list(self.entries), numbers

    @cached_property
    def pooled_cells(self) -> int:
        """Return the cells per frame to which planning pools while it reads the video, 0 = none.

        If the last tier is not much smaller than a frame, reading the survivors a second time costs no more.
        """
        last, (H, W) = self.cells[-1] if self.tiers else 0, self.grid
        pools = self.tiers > 1 and not self.intervals and RULES[self.rule].victim != "both"
        return last if pools and 4 * last <= H * W else 0

    @cached_property
    def of_means(self) -> BankLayout:
        """Return the layout of a memory of these frames' means, one token each, which makes the same decisions."""
        ones, K = ((1, 1),) * self.tiers, self.key_dim
        return BankLayout((1, 1), K, K, self.capacities, ones, self.rule, self.intervals, self.entries)

    def state_shapes(self, streams: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each tensor of `BankState`; tokens are floating, int8 or uint8."""
        M, R, quantized = self.slots, self.descriptors, not dtype.is_floating_point
        wide = torch.float32 if quantized else torch.promote_types(dtype, torch.float32)
        # int8 holds a channel, uint8 two of 4 bits
        stored = (self.dim + 1) // 2 if dtype == torch.uint8 else self.dim
        return {
            "slots": ((streams, self.rows, stored), dtype),
            "mass": ((streams, self.rows), torch.float32),
            "descriptor": ((streams, M, R, self.key_dim), wide),
            "norm": ((streams, M, R), wide),
            "link": ((streams, self.links), wide),
            "entry": ((streams, M, 4), torch.int64),
            "clock": ((streams, M, 4), torch.float64),
            "order": ((streams, M), torch.int64),
            "counter": ((streams, LENGTH + self.tiers), torch.int64),
            "scale": ((streams, self.rows if quantized else 0), torch.float32),
        }

    def new_state(self, streams: int, device: torch.device | str, dtype: torch.dtype) -> BankState:
        """Return the state of an empty memory."""
        made = {
            name: torch.zeros(shape, dtype=kind, device=device)
            for name, (shape, kind) in self.state_shapes(streams, dtype).items()
        }
        made["entry"].fill_(-1)
        made["order"].fill_(-1)
        return BankState(**made)
