"""Taking a span of time out of a memory, so that nothing computed from it remains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vmemory.banks.quantized import QuantizedState
from vmemory.reference.bank_layout import (
    DROPPED,
    FIRST,
    FRAME,
    FRAMES,
    LAST,
    LENGTH,
    RULES,
    SEEN,
    SKIPPED,
    START,
    STOP,
    BankLayout,
    BankState,
)  # fmt: skip

# rules that do not look at what frames show: what else is held says nothing about an erased frame
BLIND = ("recent", "uniform")


def check_span(t0: float, t1: float) -> None:
    """Two numbers of seconds, in order."""
    for name, t in (("t0", t0), ("t1", t1)):
        if isinstance(t, bool) or not isinstance(t, (int, float)) or math.isnan(t):
            raise ValueError(f"{name}: expected seconds, got {t!r}")
    if t1 < t0:
        raise ValueError(f"t1: expected at least t0 = {t0:g} s, got {t1:g} s")


def live_slots(state: BankState | QuantizedState, stream: int) -> Tensor:
    """Which slots `[M]` of a stream hold something.

    Raises:
        ValueError: Something held has no time.
    """
    live = state.entry[stream, :, FRAME] >= 0
    if bool((live & state.clock[stream, :, START].isnan()).any()):
        raise ValueError("time: frames that were pushed without times cannot be found by time")
    return live


def inside(state: BankState | QuantizedState, stream: int, t0: float, t1: float) -> Tensor:
    """Slots `[M]` whose entry's span meets [t0, t1]."""
    clock = state.clock[stream]
    return live_slots(state, stream) & (clock[:, START] <= t1) & (clock[:, STOP] >= t0)


def is_whole(state: BankState | QuantizedState, stream: int, layout: BankLayout) -> bool:
    """Whether every frame that came is still held by itself in its first tier: nothing was decided yet."""
    entry, counter = state.entry[stream], state.counter[stream]
    live = entry[:, FRAME] >= 0
    moved = bool(counter[LENGTH + 1 :].any())
    return not layout.intervals and not moved and int(live.sum()) == int(counter[SEEN]) and not counter[DROPPED].any()


def keep_only_(
    state: BankState | QuantizedState, stream: int, layout: BankLayout, keep: Tensor, *, renumber: bool
) -> None:
    """Rewrite one stream with nothing but the slots `keep [M]`, packed from each tier's first; the rest is zero.

    Args:
        state, stream, layout: What is changed.
        keep: bool, of slots that hold something.
        renumber: Frames are numbered as if those that leave had never come, else what leaves counts as dropped.
    """
    old = type(state)(*(t[stream].clone() for t in state))
    for name, t in zip(state._fields, state, strict=True):
        t[stream] = -1 if name in ("entry", "order") else 0
    gone = (old.entry[:, FRAME] >= 0) & ~keep
    missing = old.entry[gone, FRAME].sort().values
    for tier, capacity in enumerate(layout.capacities):
        first, cells = layout.first_slot[tier], layout.cells[tier]
        listed = old.order[first : first + int(old.counter[LENGTH + tier])]
        kept = listed[keep[listed]]
        place = torch.arange(first, first + len(kept), device=kept.device)
        inner = torch.arange(cells, device=kept.device)
        source = (layout.first_row[tier] + (kept - first)[:, None] * cells + inner).flatten()
        target = (layout.first_row[tier] + (place - first)[:, None] * cells + inner).flatten()
        for name in ("slots", "mass", "scale"):
            if name in state._fields:
                getattr(state, name)[stream, target] = getattr(old, name)[source]
        for name in ("entry", "clock", "descriptor", "norm"):
            getattr(state, name)[stream, place] = getattr(old, name)[kept]
        state.order[stream, first : first + len(kept)] = place
        state.counter[stream, LENGTH + tier] = len(kept)
        if RULES[layout.rule].choose in ("adjacent", "all"):
            _relink_(state, stream, layout, tier, len(kept), capacity)
    counter, entry = state.counter[stream], state.entry[stream]
    counter[SEEN], counter[SKIPPED], counter[DROPPED] = old.counter[SEEN], old.counter[SKIPPED], old.counter[DROPPED]
    if renumber:
        numbers = entry[:, : LAST + 1]
        numbers -= torch.where(numbers >= 0, torch.searchsorted(missing, numbers.contiguous()), 0)
        counter[SEEN] -= len(missing)
    else:
        counter[DROPPED] += old.entry[gone, FRAMES].sum()


def renumber_from_zero_(state: BankState | QuantizedState, stream: int) -> None:
    """What is held counts as all that ever came, frames numbered in their order."""
    entry = state.entry[stream]
    live = entry[:, FRAME] >= 0
    entry[live, FRAME] = entry[live, FRAME].argsort().argsort()
    for column in (FIRST, LAST):
        entry[live, column] = entry[live, FRAME]
    state.counter[stream, SEEN] = live.sum()
    state.counter[stream, DROPPED] = 0


def _relink_(
    state: BankState | QuantizedState, stream: int, layout: BankLayout, tier: int, held: int, capacity: int
) -> None:
    """Cosines of list neighbours, or of all pairs, of a tier's first `held` slots."""
    first, link = layout.first_slot[tier], state.link[stream]
    r = tier if layout.descriptors > 1 else 0
    x, norm = (t[stream, first : first + held, r] for t in (state.descriptor, state.norm))
    unit = x / norm.clamp_min(1e-8)[:, None]
    at = layout.first_link[tier]
    if RULES[layout.rule].choose == "all":
        pairs = unit @ unit.T
        pairs.fill_diagonal_(0)
        link[at : at + capacity * capacity].view(capacity, capacity)[:held, :held] = pairs
    elif held > 1:
        link[at + 1 : at + held] = (unit[1:] * unit[:-1]).sum(-1)
