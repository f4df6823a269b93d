"""Check a state before a memory takes it, because operators trust its lists and counters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.ops._checks import shape_of
from vmemory.reference.bank_layout import (
    DROPPED,
    FIRST,
    FRAME,
    FRAMES,
    LAST,
    LENGTH,
    MASS,
    SEEN,
    SKIPPED,
    START,
    STOP,
    BankLayout,
    BankState,
)

# frame numbers stay below this: centuries of video, and products with them fit int64
MOST_FRAMES = 2**48


def check_snapshot(held: Any, snapshot: Any) -> None:
    """Check that a snapshot has the fields, shapes and dtypes of the state `held`.

    Raises:
        ValueError: It has others.
    """
    if not isinstance(snapshot, type(held)):
        raise ValueError(f"snapshot: expected {type(held).__name__}, got {type(snapshot).__name__}")
    for name, old, new in zip(held._fields, held, snapshot, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(f"snapshot.{name}: expected {shape_of(old)} {old.dtype}, got {shape_of(new)} {new.dtype}")


def check_state(layout: BankLayout, state: BankState) -> None:
    """Check that lists, counters, entries, times and masses of a state fit each other; synchronises the host.

    Args:
        layout: Of the memory.
        state: Of its shapes and dtypes.

    Raises:
        ValueError: A value that no memory can have; the message names it.
    """
    order, counter, entry, clock, mass = (
        getattr(state, name).detach().cpu() for name in ("order", "counter", "entry", "clock", "mass")
    )
    check_counters("counter", counter)
    held = counter[:, LENGTH:]
    capacities = torch.tensor(layout.capacities, dtype=torch.int64)
    if bool((held > capacities).any()):
        raise ValueError(f"state.counter: expected at most {list(layout.capacities)} entries, got {held.tolist()}")
    seen, skipped = counter[:, SEEN], counter[:, SKIPPED]
    if bool(((skipped + held.sum(1) > seen) | (counter[:, DROPPED] > seen)).any()):
        raise ValueError(f"state.counter: expected no more frames than were seen, got {counter.tolist()}")
    # of each slot its tier, and that tier's first slot
    tier = torch.arange(layout.tiers).repeat_interleave(capacities)
    first = torch.tensor(layout.first_slot, dtype=torch.int64)[tier]
    place = torch.arange(layout.slots)
    count = held[:, tier]
    live = place - first < count
    listed = torch.where(live, order, place)
    inside = (listed >= first) & (listed - first < torch.where(live, count, layout.slots))
    if not bool(inside.all()) or not torch.equal(listed.sort(1).values, place.expand_as(listed)):
        raise ValueError("state.order: expected each tier's first slots, each once, got others")
    check_entries(entry[..., [FRAME, FIRST, LAST]], live, seen)
    span = entry[..., LAST] - entry[..., FIRST] + 1
    if bool((live & ((entry[..., FRAMES] < 1) | (entry[..., FRAMES] > span))).any()):
        raise ValueError("state.entry: expected between 1 and as many frames as a span has, got others")
    times = clock[live]
    if bool(times.isinf().any() | (times[:, STOP] < times[:, START]).any() | ~(times[:, MASS] >= 0).all()):
        raise ValueError("state.clock: expected finite seconds, or NaN, and masses of at least 0, got others")
    cells = torch.tensor(layout.cells, dtype=torch.int64)[tier]
    check_masses(mass, live.repeat_interleave(cells, 1))


def check_counters(name: str, counter: Tensor) -> None:
    if counter.numel() and not (int(counter.min()) >= 0 and int(counter.max()) < MOST_FRAMES):
        raise ValueError(f"state.{name}: expected 0 to 2^48, got {int(counter.min())} to {int(counter.max())}")


def check_entries(numbers: Tensor, live: Tensor, seen: Tensor) -> None:
    """Check `numbers [S, M, 3]`: frame, first, last."""
    frame, first, last = numbers.unbind(-1)
    if not torch.equal(frame >= 0, live):
        raise ValueError("state.entry: expected a frame in each slot that is listed and in no other")
    if bool((live & ~((first >= 0) & (first <= frame) & (frame <= last) & (last < seen[:, None]))).any()):
        raise ValueError("state.entry: expected frames within their span, and spans within what was seen, got others")


def check_masses(mass: Tensor, live: Tensor) -> None:
    if bool((~(mass >= 0) | mass.isinf() | (~live & (mass != 0))).any()):
        raise ValueError("state.mass: expected finite masses of at least 0, and 0 in free slots, got others")
