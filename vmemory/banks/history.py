"""Go back in time: the state of a bank at an earlier second, and its state without a span."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from vmemory.banks.archive.archive import Archive
from vmemory.banks.quantization import read_tokens
from vmemory.banks.results import Frame, whole_frame
from vmemory.ops._checks import check_int
from vmemory.ops.bank import bank_plan
from vmemory.reference.bank_layout import (
    FIRST,
    FRAME,
    FRAMES,
    LAST,
    LENGTH,
    SEEN,
    SKIPPED,
    START,
    STOP,
    TIME,
    BankLayout,
    BankState,
)


class Replayable(Protocol):
    """A bank, as far as its past needs it."""

    layout: BankLayout
    streams: int

    @property
    def state(self) -> BankState: ...

    @property
    def archive(self) -> Archive | None: ...

    @property
    def compares(self) -> bool: ...

    def replayed(self, frames: list[Frame], seen: int) -> BankState: ...

    def set_stream(self, stream: int, state: BankState) -> None: ...


def states_at(bank: Replayable, time: float) -> Iterator[tuple[int, BankState]]:
    """Yield each stream whose state was another at second `time`, with that state, as a state of one stream.

    Raises:
        ValueError: As `Bank.fork`.
    """
    if math.isnan(time):
        raise ValueError("time: expected seconds, got NaN")
    state, layout = bank.state, bank.layout
    for s in range(bank.streams):
        check_times(state.clock[s], state.entry[s])
        frames = frames_at_hand(bank, s, all_or_none=False)
        seen = int(state.counter[s, SEEN])
        after = min((n for n, frame in frames.items() if frame.time > time), default=seen)
        if not bool(((state.clock[s, :, STOP] > time) & (state.entry[s, :, FRAME] >= 0)).any()) and after == seen:
            continue
        needed = {n for n in range(after) if layout.entry_tier(n) >= 0}
        missing = needed - frames.keys()
        if missing and len(frames) != _taken(state, s):
            raise ValueError(
                f"time: expected every frame up to {time} s of stream {s} to be whole still, got {len(missing)} of "
                f"{len(needed)} dropped, reduced or merged since"
            )
        kept = [frames[n] for n in sorted(frames) if n < after]
        yield s, bank.replayed(kept, kept[-1].number + 1 if kept else 0)


def erase(bank: Replayable, t0: float, t1: float, stream: int, drop_dependent: bool) -> int:
    """Remove the frames from `t0` to `t1`, as `Bank.erase`; returns the number of entries removed."""
    if not t0 <= t1:
        raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
    check_int("stream", stream, low=0, high=bank.streams - 1)
    if not isinstance(drop_dependent, bool):
        raise TypeError(f"drop_dependent: expected True or False, got {drop_dependent!r}")
    old, layout, archive = bank.state, bank.layout, bank.archive
    entry, clock = old.entry[stream], old.clock[stream]
    check_times(clock, entry)
    live = entry[:, FRAME] >= 0
    hit = live & (clock[:, START] <= t1) & (clock[:, STOP] >= t0)
    if archive is not None:
        archive.check_times(stream)
    frames = frames_at_hand(bank, stream, all_or_none=True)
    rows: list[tuple[Tensor, ...]] = []
    removed = hit
    if len(frames) == _taken(old, stream):
        kept = [frames[n] for n in sorted(frames) if not t0 <= frames[n].time <= t1]
        state = bank.replayed(kept, int(old.counter[stream, SEEN])) if len(kept) < len(frames) else None
        if archive is not None and state is not None:
            there = whole_frames(state, layout, 0).keys() | archive.whole_numbers(stream)
            rows = archive.rows_of(stream, [frame for frame in kept if frame.number not in there])
    else:
        touched = bool(hit.any()) or may_have_seen(old, stream, t0, t1)
        if touched and bank.compares and drop_dependent:
            removed = live & (clock[:, STOP] >= t0)
        state = without(old, layout, stream, removed) if bool(removed.any()) else None
    # all that may fail has been done; from here on what goes goes everywhere, and the disk comes last
    if archive is not None:
        archive.forget(stream, (t0, t1))
    if state is not None:
        bank.set_stream(stream, state)
    if archive is not None:
        archive.put(rows)
        archive.flush()
    return int(removed.sum())


def _taken(state: BankState, s: int) -> int:
    return int(state.counter[s, SEEN] - state.counter[s, SKIPPED])


def frames_at_hand(bank: Replayable, stream: int, *, all_or_none: bool) -> dict[int, Frame]:
    """Return the frames of a stream that are still as they came, here or in the archive, by number."""
    state, layout = bank.state, bank.layout
    frames = whole_frames(state, layout, stream)
    if bank.archive is not None:
        taken = _taken(state, stream) if all_or_none else None
        frames |= bank.archive.whole_frames(stream, set(frames), taken)
    return {n: frame for n, frame in frames.items() if layout.entry_tier(n) >= 0}


def whole_frames(state: BankState, layout: BankLayout, s: int) -> dict[int, Frame]:
    """Return the entries of stream s that were neither reduced nor merged, by frame number."""
    found = {}
    entry, clock = state.entry[s].cpu(), state.clock[s].cpu()
    for slot in torch.nonzero((entry[:, FRAME] >= 0) & (entry[:, FRAMES] == 1)).flatten().tolist():
        tier = layout.tier_of[slot]
        if layout.grids[tier] == layout.grid:
            number, first = int(entry[slot, FRAME]), layout.row_of(slot)
            rows = torch.arange(first, first + layout.cells[tier], device=state.slots.device)
            # rounding what was rounded changes nothing
            tokens = read_tokens(BankState(*(x[s : s + 1] for x in state)), rows[None], layout.dim)[0]
            found[number] = whole_frame(number, float(clock[slot, TIME]), tokens, state.mass[s, rows], layout)
    return found


def check_times(clock: Tensor, entry: Tensor) -> None:
    """Check that every entry held `[M]` has a time.

    Raises:
        ValueError: One came in without.
    """
    timeless = (entry[:, FRAME] >= 0) & clock[:, [TIME, START, STOP]].isnan().any(1)
    if bool(timeless.any()):
        raise ValueError(
            f"t0, t1: expected a memory whose frames all came with a time, got {int(timeless.sum())} entries without; "
            "reset the stream instead"
        )


def may_have_seen(state: BankState, s: int, t0: float, t1: float) -> bool:
    """Return whether frames no longer held can lie within [t0, t1]: their times are known only by their neighbours'."""
    live = torch.nonzero(state.entry[s, :, FRAME] >= 0).flatten()
    live = live[state.entry[s, live, FIRST].argsort()]
    before, number = -float("inf"), 0
    for slot in live.tolist():
        if int(state.entry[s, slot, FIRST]) > number and before <= t1 and float(state.clock[s, slot, START]) >= t0:
            return True
        before, number = float(state.clock[s, slot, STOP]), int(state.entry[s, slot, LAST]) + 1
    return int(state.counter[s, SEEN]) > number and before <= t1


def without(state: BankState, layout: BankLayout, s: int, removed: Tensor) -> BankState:
    """Return stream s, as a state of one stream, without the slots in `removed [M]` bool; all else is zero."""
    out = BankState(*(torch.zeros_like(t[:1]) for t in state))
    out.entry.fill_(-1)
    out.order.fill_(-1)
    out.counter.copy_(state.counter[s : s + 1])
    gone = removed & (state.entry[s, :, FRAME] >= 0)
    # what is erased counts as never taken in
    out.counter[0, SKIPPED] += state.entry[s, gone, FRAMES].sum()
    for tier, capacity in enumerate(layout.capacities):
        first, cells = layout.first_slot[tier], layout.cells[tier]
        listed = state.order[s, first : first + int(state.counter[s, LENGTH + tier])]
        kept = listed[~removed[listed]]
        n = len(kept)
        out.counter[0, LENGTH + tier] = n
        # kernels take the first free slot to be the one after the last entry
        out.order[0, first : first + n] = torch.arange(first, first + n, device=kept.device)
        for name in ("descriptor", "norm", "entry", "clock"):
            getattr(out, name)[0, first : first + n] = getattr(state, name)[s, kept]
        rows = slice(layout.first_row[tier], layout.first_row[tier] + capacity * cells)
        there = (kept - first).to(state.slots.device)
        for name in ("slots", "mass", "scale"):
            if getattr(state, name).shape[1] == 0:
                continue
            new, old = getattr(out, name)[0, rows], getattr(state, name)[s, rows]
            new.unflatten(0, (capacity, cells))[:n] = old.unflatten(0, (capacity, cells))[there]
        links = _links(out.descriptor[0, first : first + n, tier if layout.descriptors > 1 else 0], layout, capacity)
        out.link[0, layout.first_link[tier] : layout.first_link[tier] + links.numel()] = links
    return out


def _links(means: Tensor, layout: BankLayout, capacity: int) -> Tensor:
    """Return the cosines of list neighbours for means `[n, K]`, made by the operator itself: equal to the bit."""
    n, K = means.shape
    tier = BankLayout((1, 1), K, K, (capacity,), ((1, 1),), layout.rule)
    return bank_plan(means.reshape(1, n, 1, 1, K), tier).link[0]
