"""Banks whose frames stay in the slot they were written to until another frame takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.banks.archive import Archive
from vmemory.banks.quantized import (
    AnyState,
    QuantizedState,
    rows_of_streams,
    slot_rows,
    write_tokens,
)
from vmemory.banks.single import SingleTierBank
from vmemory.banks.unbroken import unbroken
from vmemory.ops.bank import BankPlan, check_frames
from vmemory.ops.grid_pool import grid_pool
from vmemory.ops.ring import ring_push_
from vmemory.reference.bank_layout import FRAME, LENGTH, SEEN, SKIPPED, BankLayout, BankState


class SlotBank(SingleTierBank):
    """A bank that writes each frame into one slot, which the subclass chooses; no frame is moved or merged."""

    # geometry and state are those of the one-tier first-in-first-out memory; the choice is not
    rule = "recent"

    def choose(
        self, state: AnyState, taken: Tensor, held: Tensor, fed: Tensor, descriptor: Tensor, tokens: Tensor | None
    ) -> Tensor:
        """The slot `[S]` int64 that each stream writes its next frame to, −1 where it gets none. No synchronisation.

        Args:
            state: Of M at least 1 slots; only the descriptors may be changed, and those are written again.
            taken: `[S]` int64 frames taken in before, those erased left out.
            held: `[S]` int64 frames held; the slots from there on are free.
            fed: `[S]` bool, streams that get a frame.
            descriptor: `[S, K]` mean of the frame, the dtype of `state.descriptor`.
            tokens: `[S, n, D]` the frame as the bank holds it, or None unless `reads_tokens`.
        """
        raise NotImplementedError

    # choices compare what frames show, so that those of a span shape what else is held
    compares = False
    # choose looks at tokens, not at descriptors alone
    reads_tokens = False

    def _part(
        self, archive: Archive, frames: Tensor, times: Tensor | None, valid: Tensor | None, streams: Tensor | None
    ) -> None:
        # what leaves is known once its slot is chosen
        if archive.keep == "frames":
            super()._part(archive, frames, times, valid, streams)

    def _write(self, frames: Tensor, times: Tensor | None, valid: Tensor | None, streams: Tensor | None) -> None:
        state = self.state
        self._check(state, frames, times, valid, streams)
        if frames.shape[0]:
            try:
                self._replay(state, self.layout, frames, times, valid, streams, self.maps, moves=True)
            finally:
                # also of the frames taken in before an interrupt
                with unbroken():
                    _list(state)

    @torch.no_grad()
    def _plan(
        self, frames: Tensor, layout: BankLayout, times: Tensor | None, valid: Tensor | None, maps: Tensor
    ) -> BankPlan:
        check_frames(frames, layout, times, valid)
        S, T = frames.shape[:2]
        shapes = layout.state_shapes(S, frames.dtype)
        if not self.reads_tokens:
            shapes |= {name: ((S, 0, *shapes[name][0][2:]), shapes[name][1]) for name in ("slots", "mass")}
        free = {"entry": -1, "order": -1}
        state = BankState(
            **{
                name: torch.full(shape, free.get(name, 0), dtype=kind, device=frames.device)
                for name, (shape, kind) in shapes.items()
            }
        )
        chosen = self._replay(state, layout, frames, times, valid, None, maps, moves=self.reads_tokens)
        _list(state)
        assign = chosen
        if layout.slots:
            held = state.entry[..., FRAME].gather(1, chosen.clamp_min(0))
            assign = torch.where(held == torch.arange(T, device=frames.device), chosen, -1)
        return BankPlan(*state[2:], assign, frames.new_empty((S, T, 0, layout.dim)))

    def _replay(
        self, state: AnyState, layout: BankLayout, frames: Tensor, times: Tensor | None,
        valid: Tensor | None, streams: Tensor | None, maps: Tensor, *, moves: bool,
    ) -> Tensor:  # fmt: skip
        """Take `frames [S', T, H, W, D]` into `state`, tokens only if it `moves`; the slots `[S, T]` they got."""
        frames, S = frames.detach(), state.counter.shape[0]
        stream = torch.arange(S, device=frames.device)
        # the row of frames that feeds each stream
        row = stream if streams is None else rows_of_streams(streams, S)
        fed = row >= 0
        means, mass = self._describe(frames, valid)
        means = means.to(state.descriptor.dtype)
        norms = means.norm(dim=-1, keepdim=True)
        when = mass.new_full(mass.shape, torch.nan) if times is None else times
        clocks = torch.stack([when, when, when, mass], -1)
        ones = torch.ones_like(row)
        chosen = [row.new_empty((S, 0))]
        for t in range(frames.shape[1]):
            with unbroken():
                seen = state.counter[:, SEEN]
                if layout.slots == 0:
                    state.counter[:, : SKIPPED + 1] += fed[:, None]
                    chosen.append(torch.full_like(row, -1)[:, None])
                    continue
                held = state.counter[:, LENGTH]
                there = None if valid is None else valid[:, t]
                tokens, cells = self._enter(frames[:, t], there, maps) if moves else (None, None)
                slot = self.choose(
                    state, seen - state.counter[:, SKIPPED], held, fed, _rows(means[:, t], row, streams),
                    _rows(tokens, row, streams) if tokens is not None and self.reads_tokens else None,
                )  # fmt: skip
                replaces = fed & (held == layout.slots)
                if self._archive is not None and self._archive.keep == "evicted" and state.entry is self.entry:
                    self._archive.box.add_slots(state, slot, replaces)
                at = slot.clamp_min(0)
                written = [(state.descriptor, means[:, t]), (state.norm, norms[:, t]), (state.clock, clocks[:, t])]
                if tokens is not None and cells is not None:
                    if isinstance(state, QuantizedState):
                        rows = slot_rows(layout, 0, at)
                        write_tokens(state, rows, fed, _rows(tokens, row, streams), _rows(cells, row, streams))
                    else:
                        written += [(state.slots, tokens), (state.mass, cells)]
                for buffer, value in written:
                    # a ring writes where its counter points to and moves it on, and skips the rows without a stream
                    flat = value.flatten(1)[:, None, None]
                    ring_push_(buffer.view(S, layout.slots, 1, -1), at.clone(), flat, streams)
                frame = torch.stack([seen, seen, seen, ones], 1)
                if streams is not None:
                    frame = torch.where(fed[:, None], frame, state.entry[stream, at])
                state.entry[stream, at] = frame
                chosen.append(slot[:, None])
                # seen, skipped, dropped, held
                state.counter.add_(torch.stack([fed, torch.zeros_like(fed), replaces, fed ^ replaces], 1))
        return torch.cat(chosen, 1)

    def _describe(self, frames: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means `[S, T, K]` of the cells that exist, and how many they are, `[S, T]` float64."""
        keys = frames[..., : self.layout.key_dim]
        if valid is None:
            cells = torch.full(frames.shape[:2], float(self._cells), dtype=torch.float64, device=frames.device)
            return grid_pool(keys, 1, stats=True).mean, cells
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cells = valid.sum((2, 3))
        mean = torch.where(valid[..., None], wide, 0).sum((2, 3)) / cells.clamp_min(1)[..., None]
        return mean, cells.double()

    def _enter(self, frames: Tensor, valid: Tensor | None, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Frames `[S, H, W, D]` as the bank holds them, `[S, n, D]`, and the cells each token stands for, `[S, n]`.

        `maps` is `layout_maps` where the frames are, which a bank that only compresses may not be.
        """
        (H, W), (h, w) = self.layout.grid, self.layout.grids[0] if self.layout.grids else self.layout.grid
        if valid is None:
            pooled = frames if (h, w) == (H, W) else grid_pool(frames, (h, w))
            return pooled.flatten(1, 2), torch.full((frames.shape[0], h * w), H * W / (h * w), device=frames.device)
        if (h, w) == (H, W):
            return torch.where(valid[..., None], frames, 0).flatten(1, 2), valid.flatten(1).float()
        rows, columns = maps[: h * H].view(h, H), maps[h * H : h * H + w * W].view(w, W)
        wide = torch.where(valid[..., None], frames.to(rows.dtype), 0)
        held = torch.einsum("ih,jw,shw->sij", rows, columns, valid.to(rows.dtype))
        summed = torch.einsum("ih,jw,shwd->sijd", rows, columns, wide)
        pooled = torch.where(held[..., None] > 0, summed / held[..., None].clamp_min(1e-30), 0)
        return pooled.to(frames.dtype).flatten(1, 2), (held * (H * W / (h * w))).float().flatten(1)


def _list(state: AnyState) -> None:
    """Slots are filled one after the other, and listed so."""
    place = torch.arange(state.order.shape[1], device=state.order.device)
    if len(place):
        state.order.copy_(torch.where(place < state.counter[:, LENGTH:], place, -1))


def _rows(values: Tensor, row: Tensor, streams: Tensor | None) -> Tensor:
    """Values of rows as values of the streams they feed."""
    return values if streams is None else values[row.clamp_min(0)]
