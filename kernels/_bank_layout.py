"""A tiered memory's layout as a compile-time constant of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from vmemory.kernels._launch import power_of_two


class Rule(NamedTuple):
    choose: str
    newer: bool
    merge: bool
    by_time: bool
    cascade: bool
    nan_first: bool


def rule_of(numbers: Sequence[int]) -> Rule:
    """Read a rule as operators take it: choose, victim, by_time, cascade, nan_first."""
    choose, victim, by_time, cascade, nan_first = numbers
    chosen = ("adjacent", "all", "gap", "oldest")[choose]
    return Rule(chosen, victim == 1, victim == 2, bool(by_time), bool(cascade), bool(nan_first))


class Geometry(NamedTuple):
    """A memory's layout as a compile-time constant."""

    rule: Rule
    tiers: int
    capacity: tuple[int, ...]
    height: tuple[int, ...]
    width: tuple[int, ...]
    slot0: tuple[int, ...]
    row0: tuple[int, ...]
    link0: tuple[int, ...]
    intervals: tuple[int, ...]
    entries: tuple[int, ...]
    entered: tuple[int, ...]
    # offsets of the weights in the table: [source][tier], then of each step down
    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    step_rows: tuple[int, ...]
    step_columns: tuple[int, ...]
    # powers of two that cover a tier's slots, its sides and the other sizes
    block: tuple[int, ...]
    block_h: tuple[int, ...]
    block_w: tuple[int, ...]
    M: int
    L: int
    P: int
    R: int
    K: int
    D: int
    H: int
    W: int
    block_H: int
    block_W: int
    block_r: int
    block_k: int


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


@lru_cache(maxsize=256)
def geometry(
    capacities: tuple[int, ...],
    grids: tuple[int, ...],
    intervals: tuple[int, ...],
    entries: tuple[int, ...],
    rule: tuple[int, ...],
    H: int,
    W: int,
    D: int,
    R: int,
    K: int,
) -> Geometry:
    """Build the constant from an operator's layout arguments, for frames `[H, W, D]` with R descriptors per slot."""
    tiers, chosen = len(capacities), rule_of(rule)
    height, width = tuple(grids[::2]), tuple(grids[1::2])
    cells = [c * h * w for c, h, w in zip(capacities, height, width, strict=True)]
    links = [c * c if chosen.choose == "all" else c for c in capacities]
    at, rows, columns, step_rows, step_columns = 0, [], [], [], []
    for source in range(tiers):
        rows.append([0] * tiers)
        columns.append([0] * tiers)
        for tier in range(source, tiers):
            rows[source][tier], columns[source][tier] = at, at + height[tier] * H
            at += height[tier] * H + width[tier] * W
    for tier in range(tiers - 1):
        step_rows.append(at)
        step_columns.append(at + height[tier + 1] * height[tier])
        at += height[tier + 1] * height[tier] + width[tier + 1] * width[tier]
    entered = sorted({t for t in entries if t >= 0}) if intervals else range(min(tiers, 1))
    return Geometry(
        rule=chosen,
        tiers=tiers,
        capacity=capacities,
        height=height,
        width=width,
        slot0=_starts(capacities),
        row0=_starts(cells),
        link0=_starts(links),
        intervals=intervals,
        entries=entries,
        entered=tuple(entered),
        rows=tuple(map(tuple, rows)),
        columns=tuple(map(tuple, columns)),
        step_rows=tuple(step_rows),
        step_columns=tuple(step_columns),
        block=tuple(map(power_of_two, capacities)),
        block_h=tuple(map(power_of_two, height)),
        block_w=tuple(map(power_of_two, width)),
        M=sum(capacities),
        L=sum(cells),
        P=sum(links),
        R=R,
        K=K,
        D=D,
        H=H,
        W=W,
        block_H=power_of_two(H),
        block_W=power_of_two(W),
        block_r=power_of_two(R),
        block_k=min(1024, power_of_two(K)),
    )
