"""Buffer frames that leave a memory: fixed shape, on the device, filled without synchronising the host."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.banks.quantization import words
from vmemory.ops.quantize_slots import quantize_slots
from vmemory.reference.bank_layout import SEEN, BankLayout, BankState

# numbers of an entry of the outbox: STREAM, then those of BankState.entry, then LEVEL
STREAM, LEVEL = 0, 5


class Outbox:
    """A buffer of n frames of a bank's layout, and one more place for frames that find no room.

    Attributes:
        parts: The content of the frames' cells, as in the bank: tokens `[n + 1, rows, D]`; in a bank of 8 or 4 bits
            codes `[n + 1, rows, stored]` and scale `[n + 1, rows]` float32. The last part is mass `[n + 1, rows]`
            float32, the number of cells that a token stands for.
        numbers: `[n + 1, 6]` int64 stream, frame, first, last, frames, tier (−1 = as it came in).
        clock: `[n + 1, 3]` float64 seconds: time, start, stop.
        count: `[2]` int64: frames in the buffer, and frames that found no room.
    """

    def __init__(self, room: int, rows: int, layout: BankLayout, state: BankState) -> None:
        self.room, self.layout, self.device = room, layout, state.slots.device
        device, held = self.device, state.slots
        self.bits = (8 if held.dtype == torch.int8 else 4) if state.quantized else None
        flat = [torch.zeros((room + 1, rows), device=device) for _ in range(1 if self.bits is None else 2)]
        self.parts = (held.new_zeros((room + 1, rows, held.shape[2])), *flat)
        self.numbers = torch.zeros((room + 1, 6), dtype=torch.int64, device=device)
        self.clock = torch.zeros((room + 1, 3), dtype=torch.float64, device=device)
        self.count = torch.zeros(2, dtype=torch.int64, device=device)
        self._tier = torch.tensor(layout.tier_of, dtype=torch.int64, device=device)
        self._row = torch.tensor([layout.row_of(m) for m in range(layout.slots)], dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)
        self._streams = torch.arange(state.counter.shape[0], device=device)
        self._last_row = len(self._streams) * layout.rows - 1

    def frames(self) -> tuple[Tensor, ...]:
        """Return all tensors of the frames: the parts, numbers, clock."""
        return *self.parts, self.numbers, self.clock

    def release(self) -> None:
        """Free the places of all frames; their bytes stay until they are overwritten."""
        self.count[:1].zero_()

    def clear(self) -> None:
        """Fill with zeros every byte but the count of frames that found no room."""
        for t in self.frames():
            t.zero_()
        self.release()

    def add(self, parts: tuple[Tensor, ...], numbers: Tensor, clock: Tensor, there: Tensor) -> None:
        """Add the frames that are `there [n]` bool, of parts `[n, rows, ...]`, numbers `[n, 6]` and clock `[n, 3]`."""
        place = self.count[0] + there.cumsum(0) - 1
        fits = there & (place < self.room)
        at = torch.where(fits, place, self.room)
        pairs = list(zip(self.parts, parts, strict=True))
        if self.bits is not None:
            pairs[0] = words(self.parts[0]), words(parts[0])
        for held, new in pairs:
            held[:, : new.shape[1]].index_copy_(0, at, new)
        self.numbers.index_copy_(0, at, numbers)
        self.clock.index_copy_(0, at, clock)
        self.count += torch.stack([fits, there ^ fits]).sum(1)

    def add_slots(self, state: BankState, slot: Tensor, streams: Tensor | None) -> None:
        """Add the content of `slot [S']` of the streams `[S']` (None = all in order); −1 = nothing."""
        stream = self._streams if streams is None else streams.clamp_min(0)
        at = slot.clamp_min(0)
        # a small tier has fewer cells than a place has rows; the rows behind them hold others' data and are not read
        index = (self._row[at] + stream * self.layout.rows)[:, None] + self._rows
        index = index.clamp_max_(self._last_row).flatten()
        held = (state.slots, state.mass) if self.bits is None else (state.slots, state.scale, state.mass)
        parts = tuple(x.flatten(0, 1).index_select(0, index).unflatten(0, (len(slot), -1)) for x in held)
        entry = at + stream * self.layout.slots
        numbers = torch.cat(
            [stream[:, None], state.entry.flatten(0, 1).index_select(0, entry), self._tier[at][:, None]], 1
        )
        clock = state.clock.flatten(0, 1).index_select(0, entry)[:, : self.clock.shape[1]]
        self.add(parts, numbers, clock, slot >= 0)

    def add_frames(
        self, state: BankState, frames: Tensor, time: Tensor | None, mask: Tensor | None, streams: Tensor | None
    ) -> None:
        """Add `frames [S', 1, H, W, D]` as they enter `state`; rows of a negative stream are skipped."""
        stream = self._streams if streams is None else streams
        seen = state.counter[stream.clamp_min(0), SEEN]
        frames, mask = frames[:, 0], None if mask is None else mask[:, 0]
        S = frames.shape[0]
        mass = torch.ones(frames.shape[:3], device=frames.device) if mask is None else mask.float()
        tokens = frames if mask is None else torch.where(mask[..., None], frames, 0)
        when = mass.new_full((S, 1), torch.nan, dtype=torch.float64) if time is None else time
        numbers = torch.stack([stream, seen, seen, seen, torch.ones_like(seen), torch.full_like(seen, -1)], 1)
        clock = when.expand(-1, 3)
        held = (tokens.flatten(1, 2),) if self.bits is None else quantize_slots(tokens.flatten(1, 2), self.bits)
        self.add((*held, mass.flatten(1)), numbers, clock, stream >= 0)
