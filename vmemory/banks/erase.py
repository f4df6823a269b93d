"""A stream's state without some of its entries, and the frames that are still whole and can be taken in again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmemory.banks.quantized import read_tokens
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


@dataclass
class Frame:
    """A frame as it came in: `tokens [H, W, D]`, `valid [H, W]` bool or None (all cells exist), time in seconds."""

    number: int
    time: float
    tokens: Tensor
    valid: Tensor | None


def whole_frames(state: BankState, layout: BankLayout, s: int) -> dict[int, Frame]:
    """Entries of stream s that were neither reduced nor merged, by frame number."""
    found = {}
    entry, clock = state.entry[s].cpu(), state.clock[s].cpu()
    for slot in torch.nonzero((entry[:, FRAME] >= 0) & (entry[:, FRAMES] == 1)).flatten().tolist():
        tier = layout.tier_of[slot]
        if layout.grids[tier] == layout.grid:
            number, first = int(entry[slot, FRAME]), layout.row_of(slot)
            rows = torch.arange(first, first + layout.cells[tier], device=state.slots.device)
            # rounding what was rounded changes nothing
            tokens = read_tokens(BankState(*(x[s : s + 1] for x in state)), rows[None], layout.dim)[0]
            found[number] = whole(number, float(clock[slot, TIME]), tokens, state.mass[s, rows], layout)
    return found


def whole(number: int, time: float, tokens: Tensor, mass: Tensor, layout: BankLayout) -> Frame:
    """A frame from the token rows `[H·W, D]` and masses `[H·W]` it was held as."""
    there = mass.reshape(layout.grid) > 0
    return Frame(number, time, tokens.reshape(*layout.grid, -1), None if bool(there.all()) else there)


def check_times(clock: Tensor, entry: Tensor) -> None:
    """Every entry held `[M]` has a time.

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
    """Whether frames no longer held can lie within [t0, t1]: their times are known only by their neighbours'."""
    live = torch.nonzero(state.entry[s, :, FRAME] >= 0).flatten()
    live = live[state.entry[s, live, FIRST].argsort()]
    before, number = -float("inf"), 0
    for slot in live.tolist():
        if int(state.entry[s, slot, FIRST]) > number and before <= t1 and float(state.clock[s, slot, START]) >= t0:
            return True
        before, number = float(state.clock[s, slot, STOP]), int(state.entry[s, slot, LAST]) + 1
    return int(state.counter[s, SEEN]) > number and before <= t1


def without(state: BankState, layout: BankLayout, s: int, removed: Tensor) -> BankState:
    """Stream s, as a state of one stream, without the slots in `removed [M]` bool; all else is zero."""
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
    """Cosines of list neighbours for means `[n, K]`, by the operator itself: the same arithmetic, to the bit."""
    n, K = means.shape
    tier = BankLayout((1, 1), K, K, (capacity,), ((1, 1),), layout.rule)
    return bank_plan(means.reshape(1, n, 1, 1, K), tier).link[0]
