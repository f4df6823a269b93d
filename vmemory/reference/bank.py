"""Update a tiered memory in plain PyTorch: one frame at a time, with decisions on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.reference.bank_layout import (
    DROPPED,
    FRAME,
    FRAMES,
    LAST,
    LENGTH,
    MASS,
    RULES,
    SEEN,
    SKIPPED,
    STEP_HEAD,
    STOP,
    TIME,
    BankLayout,
    BankState,
)
from vmemory.reference.quantize_slots import dequantize_slots, quantize_slots

_EPS = 1e-8


def describe(frame: Tensor, mass: Tensor, layout: BankLayout, source: int) -> Tensor:
    """Return descriptors `[R, K]` of a frame `[H, W, D]` with cell masses `[H, W]`.

    R = 1: the mean of its cells, if every reduction of the layout preserves it. Otherwise the mean in each tier.
    """
    wide = torch.promote_types(frame.dtype, torch.float32)
    out = frame.new_zeros(layout.descriptors, layout.key_dim, dtype=wide)
    keys = torch.where(mass[..., None] > 0, frame[..., : layout.key_dim].to(wide), 0)
    per_tier = layout.descriptors > 1
    for r in range(source if per_tier else 0, out.shape[0]):
        maps = layout.maps(source, r) if per_tier else (torch.ones(1, n, dtype=wide) for n in layout.grid)
        rows, columns = (m.mean(0).to(frame.device, wide) for m in maps)
        weights = rows[:, None] * columns * mass.to(wide)
        if weights.sum() > 0:
            out[r] = torch.einsum("hw,hwk->k", weights, keys) / weights.sum()
    return out


def pool(tokens: Tensor, mass: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Pool `tokens [H, W, D]` by axis weights `[h, H]`, `[w, W]`; cells of mass 0 do not count.

    Returns tokens `[h, w, D]` and mass `[h, w]`, the number of source cells in each token.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    rows, columns = rows.to(tokens.device, wide), columns.to(tokens.device, wide)
    held = torch.einsum("ih,jw,hw->ij", rows, columns, mass.to(wide))
    kept = torch.where(mass[..., None] > 0, tokens.to(wide), 0) * mass[..., None].to(wide)
    summed = torch.einsum("ih,jw,hwd->ijd", rows, columns, kept)
    pooled = torch.where(held[..., None] > 0, summed / held[..., None].clamp_min(1e-30), 0)
    ratio = mass.numel() / (rows.shape[0] * columns.shape[0])
    return pooled.to(tokens.dtype), (held * ratio).to(torch.float32)


class Decision(NamedTuple):
    """The changes of one frame in a stream.

    `first` is the tier that the frame enters, −1 = none; `chain` the slots that full tiers give up, from there down;
    `free` the slot in which the chain ends, −1 = it leaves the memory; `merged` the slot that the only victim is merged
    into, if any.
    """

    first: int
    chain: list[int]
    free: int
    merged: int | None

    @property
    def fresh(self) -> int:
        """The slot that the frame takes, −1 = none."""
        return self.chain[0] if self.chain else self.free

    def target(self, i: int) -> int:
        """Return where the i-th victim goes, −1 = it leaves the memory or is merged."""
        if self.merged is not None:
            return -1
        return self.chain[i + 1] if i + 1 < len(self.chain) else self.free


class Stream:
    """One stream's part of a state; `move` moves its tokens."""

    def __init__(self, state: BankState, s: int, layout: BankLayout) -> None:
        self.layout, self.rule = layout, RULES[layout.rule]
        self.state = BankState(*(t[s] for t in state))

    def size(self, tier: int) -> int:
        return int(self.state.counter[LENGTH + tier])

    def listed(self, tier: int) -> list[int]:
        first = self.layout.first_slot[tier]
        return self.state.order[first : first + self.size(tier)].tolist()

    def write_list(self, tier: int, slots: Sequence[int]) -> None:
        first, capacity = self.layout.first_slot[tier], self.layout.capacities[tier]
        padded = [*slots, *[-1] * (capacity - len(slots))]
        self.state.order[first : first + capacity] = torch.tensor(padded, device=self.state.order.device)
        self.state.counter[LENGTH + tier] = len(slots)

    def cosine(self, tier: int, a: int, b: int) -> float:
        r = tier if self.layout.descriptors > 1 else 0
        x, y = self.state.descriptor[a, r], self.state.descriptor[b, r]
        norms = self.state.norm[a, r].clamp_min(_EPS) * self.state.norm[b, r].clamp_min(_EPS)
        return float((x * y).sum() / norms)

    def closest(self, tier: int, pairs: list[tuple[int, int]]) -> tuple[int, int]:
        """Return the pair of slots with the largest cosine, the first of equals; NaN is the largest."""
        best, chosen = -math.inf, pairs[0]
        for a, b in pairs:
            c = self.cosine(tier, a, b)
            if math.isnan(c):
                return a, b
            if c > best:
                best, chosen = c, (a, b)
        return chosen

    def leaving(self, tier: int, frame: int, wanted: int) -> tuple[int, int | None]:
        """Return the slot that a full tier gives up, and the slot it is merged into, if any.

        `wanted` is the caller's choice; a slot that the tier does not hold leaves the choice to the rule.
        """
        slots = self.listed(tier)
        if wanted in slots:
            if self.rule.victim != "both" or len(slots) == 1:
                return wanted, None
            # the first of a list has no older neighbour, so the next one is merged into it
            place = max(slots.index(wanted), 1)
            pair = slots[place - 1 : place + 1]
            r = tier if self.layout.descriptors > 1 else 0
            if self.rule.nan_first and not bool(self.state.norm[pair, r].isfinite().all()):
                return wanted, None
            return pair[1], pair[0]
        if len(slots) == 1 or self.rule.choose == "oldest":
            return slots[0], None
        if self.rule.choose == "gap":
            frames = [int(self.state.entry[s, FRAME]) for s in slots] + [frame]
            gaps = [frames[i + 1] - frames[i - 1] for i in range(1, len(slots))]
            return slots[1 + gaps.index(min(gaps))], None
        if self.rule.choose == "all":
            pairs = [(a, b) for i, a in enumerate(slots) for b in slots[i + 1 :]]
        else:
            pairs = list(pairwise(slots))
        older, newer = self.closest(tier, pairs)
        if self.rule.nan_first and math.isnan(self.cosine(tier, older, newer)):
            r = tier if self.layout.descriptors > 1 else 0
            return (newer if math.isfinite(float(self.state.norm[older, r])) else older), None
        if self.rule.victim == "both":
            return newer, older
        return (older if self.rule.victim == "older" else newer), None

    def insert(self, tier: int, slot: int) -> None:
        slots = self.listed(tier)
        place = len(slots)
        if self.rule.by_time:
            while place and self.state.entry[slots[place - 1], FRAME] > self.state.entry[slot, FRAME]:
                place -= 1
        self.write_list(tier, [*slots[:place], slot, *slots[place:]])

    def copy_entry(self, source: int, target: int) -> None:
        for t in (self.state.descriptor, self.state.norm, self.state.entry, self.state.clock):
            t[target] = t[source]

    def merge_entry(self, a: int, b: int) -> None:
        """Merge slot b, the newer neighbour, into slot a."""
        entry, clock = self.state.entry, self.state.clock
        wa, wb = clock[a, MASS].clone(), clock[b, MASS].clone()
        share = (wa / (wa + wb)).to(self.state.descriptor.dtype) if wa + wb > 0 else torch.tensor(0.5)
        self.state.descriptor[a] = share * self.state.descriptor[a] + (1 - share) * self.state.descriptor[b]
        self.state.norm[a] = self.state.descriptor[a].norm(dim=-1)
        na, nb = entry[a, FRAMES].item(), entry[b, FRAMES].item()
        clock[a, TIME] = (clock[a, TIME] * na + clock[b, TIME] * nb) / (na + nb)
        clock[a, STOP], clock[a, MASS] = clock[b, STOP], wa + wb
        entry[a, LAST], entry[a, FRAMES] = entry[b, LAST], na + nb

    def decide(self, victim: Sequence[int] | None) -> Decision:
        """Decide what the next frame does; `victim` holds a slot that each tier gives up if full, −1 = by the rule."""
        frame = int(self.state.counter[SEEN])
        tier = first = self.layout.entry_tier(frame)
        if tier < 0:
            return Decision(-1, [], -1, None)
        chain, merged = [], None
        while self.size(tier) == self.layout.capacities[tier]:
            slot, merged = self.leaving(tier, frame, -1 if victim is None else victim[tier])
            chain.append(slot)
            if merged is not None or tier + 1 == self.layout.tiers or (not self.rule.cascade and len(chain) == 2):
                break
            tier += 1
        fits = self.size(tier) < self.layout.capacities[tier]
        free = self.layout.first_slot[tier] + self.size(tier) if fits else -1
        return Decision(first, chain, free, merged)

    def push(
        self,
        descriptor: Tensor,
        mass: float,
        time: float,
        tokens: Tokens | None,
        victim: Sequence[int] | None = None,
    ) -> list[tuple[int, int]]:
        """Push one frame; return the moves (from, to) of slots in their order, `to` −1 = left the memory."""
        counter = self.state.counter
        frame = int(counter[SEEN])
        decision = self.decide(victim)
        counter[SEEN] += 1
        first, chain, merged = decision.first, decision.chain, decision.merged
        if first < 0:
            counter[SKIPPED] += 1
            return [(-2, -1)]
        moves: list[tuple[int, int]] = []
        for i in reversed(range(len(chain))):
            slot, at, target = chain[i], first + i, decision.target(i)
            self.write_list(at, [s for s in self.listed(at) if s != slot])
            if merged is not None:
                moves.append((slot, merged))
                if tokens is not None:
                    tokens.merge(merged, slot)
                self.merge_entry(merged, slot)
                continue
            moves.append((slot, target))
            if target < 0:
                counter[DROPPED] += 1
                continue
            if tokens is not None:
                tokens.demote(slot, target)
            self.copy_entry(slot, target)
            self.insert(at + 1, target)
        slot = decision.fresh
        self.state.descriptor[slot], self.state.norm[slot] = descriptor, descriptor.norm(dim=-1)
        self.state.entry[slot] = torch.tensor([frame, frame, frame, 1])
        self.state.clock[slot] = torch.tensor([time, time, time, mass], dtype=torch.float64)
        if tokens is not None:
            tokens.enter(slot, first)
        self.insert(first, slot)
        moves.append((-2, slot))
        return moves


class Tokens:
    """Token rows of one stream during a push; rows in 8 or 4 bits are quantised again when they are pooled."""

    def __init__(self, state: BankState, layout: BankLayout, frame: Tensor, mass: Tensor) -> None:
        self.state, self.layout, self.frame, self.mass = state, layout, frame, mass

    def rows(self, slot: int) -> slice:
        first = self.layout.row_of(slot)
        return slice(first, first + self.layout.cells[self.layout.tier_of[slot]])

    def read(self, slot: int) -> tuple[Tensor, Tensor]:
        grid = self.layout.grids[self.layout.tier_of[slot]]
        rows = self.rows(slot)
        tokens = self.state.slots[rows]
        if self.state.quantized:
            tokens = dequantize_slots(tokens, self.state.scale[rows], None, self.layout.dim)
        return tokens.reshape(*grid, -1), self.state.mass[rows].reshape(grid)

    def write(self, slot: int, tokens: Tensor, mass: Tensor) -> None:
        rows, stored = self.rows(slot), tokens.flatten(0, 1)
        if self.state.quantized:
            bits = 8 if self.state.slots.dtype == torch.int8 else 4
            stored, self.state.scale[rows] = quantize_slots(stored, bits)
        self.state.slots[rows], self.state.mass[rows] = stored, mass.flatten()

    def demote(self, source: int, target: int) -> None:
        tier = self.layout.tier_of[source]
        self.write(target, *pool(*self.read(source), self.layout.step(tier, 0), self.layout.step(tier, 1)))

    def merge(self, a: int, b: int) -> None:
        (x, mx), (y, my) = self.read(a), self.read(b)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = mx + my
        share = torch.where(total > 0, mx / total.clamp_min(1e-30), 0.0)[..., None].to(wide)
        self.write(a, (share * x.to(wide) + (1 - share) * y.to(wide)).to(x.dtype), total)

    def enter(self, slot: int, tier: int) -> None:
        self.write(slot, *pool(self.frame, self.mass, *self.layout.maps(tier, tier)))


def bank_decide(state: BankState, layout: BankLayout, streams: Tensor | None, victim: Tensor | None) -> Tensor:
    """Return what the next frame of each row does, `[S, 3 + 2 tiers]` int64; the state stays as it is."""
    rows = state.counter.shape[0] if streams is None else streams.shape[0]
    step = torch.full((rows, STEP_HEAD + 2 * layout.tiers), -1, dtype=torch.int64)
    for i in range(rows):
        s = i if streams is None else int(streams[i])
        if not 0 <= s < state.counter.shape[0]:
            continue
        decision = Stream(state, s, layout).decide(None if victim is None else victim[i].tolist())
        merged = -1 if decision.merged is None else decision.merged
        step[i, :STEP_HEAD] = torch.tensor([decision.first, decision.fresh, merged])
        for k, slot in enumerate(decision.chain):
            step[i, STEP_HEAD + decision.first + k] = slot
            step[i, STEP_HEAD + layout.tiers + decision.first + k] = decision.target(k)
    return step.to(state.order.device)


def bank_push_(
    state: BankState,
    layout: BankLayout,
    frames: Tensor,
    time: Tensor | None,
    mask: Tensor | None,
    streams: Tensor | None,
    victim: Tensor | None = None,
) -> None:
    """Push `frames [S, T, H, W, D]` into `state`, in place; slots in `victim [S, T, tiers]` override the rule."""
    for i in range(frames.shape[0]):
        s = i if streams is None else int(streams[i])
        if not 0 <= s < state.counter.shape[0]:
            continue
        stream = Stream(state, s, layout)
        for t in range(frames.shape[1]):
            mass = torch.ones(layout.grid, device=frames.device) if mask is None else mask[i, t].float()
            source = layout.entry_tier(int(stream.state.counter[SEEN]))
            descriptor = describe(frames[i, t], mass, layout, source) if source >= 0 else frames.new_zeros(())
            when = math.nan if time is None else float(time[i, t])
            chosen = None if victim is None else victim[i, t].tolist()
            stream.push(descriptor, float(mass.sum()), when, Tokens(stream.state, layout, frames[i, t], mass), chosen)


def bank_plan(frames: Tensor, layout: BankLayout, time: Tensor | None, mask: Tensor | None) -> tuple[BankState, Tensor]:
    """Replay every decision of a new memory for `frames [S, T, H, W, D]` on descriptors alone.

    Returns the state without tokens (slots and mass empty) and `assign [S, T]` int64, the slot each frame ends in
    (−1 = none).
    """
    S, T = frames.shape[:2]
    state = layout.new_state(S, frames.device, frames.dtype)
    assign = torch.full((S, T), -1, dtype=torch.int64, device=frames.device)
    for s in range(S):
        stream = Stream(state, s, layout)
        for t in range(T):
            mass = torch.ones(layout.grid, device=frames.device) if mask is None else mask[s, t].float()
            source = layout.entry_tier(t)
            descriptor = describe(frames[s, t], mass, layout, source) if source >= 0 else frames.new_zeros(())
            when = math.nan if time is None else float(time[s, t])
            for source_slot, target in stream.push(descriptor, float(mass.sum()), when, None):
                if source_slot == -2:
                    assign[s, t] = target
                else:
                    assign[s, :t][assign[s, :t] == source_slot] = target
    empty = state.slots.new_empty((S, 0, layout.dim)), state.mass.new_empty((S, 0))
    return state._replace(slots=empty[0], mass=empty[1]), assign


def bank_gather(frames: Tensor, assign: Tensor, layout: BankLayout, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pool each surviving frame of `frames [S, T, H, W, D]` directly to its final size; differentiable.

    Returns slots `[S, L, D]` and mass `[S, L]`, equal to pushing frame by frame up to rounding.
    """
    S, T = frames.shape[:2]
    wide = torch.promote_types(frames.dtype, torch.float32)
    sums = frames.new_zeros((S, layout.rows, layout.dim), dtype=wide)
    masses = frames.new_zeros((S, layout.rows), dtype=torch.float32)
    for s in range(S):
        for t in range(T):
            slot = int(assign[s, t])
            if slot < 0:
                continue
            mass = torch.ones(layout.grid, device=frames.device) if mask is None else mask[s, t].float()
            tier = layout.tier_of[slot]
            pooled, held = pool(frames[s, t].to(wide), mass, *layout.maps(layout.entry_tier(t), tier))
            rows = torch.arange(layout.row_of(slot), layout.row_of(slot) + layout.cells[tier], device=frames.device)
            weighted = (pooled * held[..., None].to(wide)).flatten(0, 1)
            sums = sums.index_put((torch.tensor(s), rows), weighted, accumulate=True)
            masses = masses.index_put((torch.tensor(s), rows), held.flatten(), accumulate=True)
    tokens = torch.where(masses[..., None] > 0, sums / masses[..., None].clamp_min(1e-30).to(wide), 0)
    return tokens.to(frames.dtype), masses
