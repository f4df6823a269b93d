"""The contract every memory fulfils: push, read, compress, retrieve, snapshot, reset; bounded, device-side state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmemory.banks.archive import Archive
from vmemory.banks.lock import MemoryLock, locked
from vmemory.banks.past import PastModule
from vmemory.banks.quantized import new_state
from vmemory.banks.reads import BankReads
from vmemory.banks.streams import check_rows
from vmemory.banks.tiers import clamped, make_layout
from vmemory.banks.times import Times, as_times, check_seconds, on_device
from vmemory.banks.tokens import MemoryTokens, compact_tokens, padded_tokens, row_tables
from vmemory.banks.unbroken import unbroken
from vmemory.ops._checks import check_int, shape_of
from vmemory.ops.bank import BankPlan, bank_decide, bank_gather, bank_plan, bank_push_, check_push, layout_maps
from vmemory.reference.bank_layout import (
    FRAME,
    LENGTH,
    STOP,
    BankLayout,
    BankState,
)


class Bank(PastModule, BankReads):
    """A bounded memory of a frame stream, or of many streams that share a launch.

    State is device tensors of fixed shape, allocated here and changed in place: pushes never synchronise the host,
    can be captured in a CUDA graph and compile without graph breaks. Buffers are not part of `state_dict`; streaming
    state travels by `snapshot` and `save`.

    Any call may come from any thread: calls on one bank take turns. Compiled pushes, replayed graphs and the tensors of
    `state` themselves take no lock.

    Args:
        dim: Channels D of a token.
        grid: Token grid (H, W) of the frames that come in.
        capacities: Slots of each tier; a tier of capacity 0 does not exist, its frames go on to the next or leave.
        grids: Token grid of each tier, None = the frames' own; never larger than `grid`.
        rule: A key of `vmemory.reference.bank_layout.RULES`.
        intervals: Frame t enters the first tier whose interval divides t, and is skipped when none does; None = every
            frame enters the first tier.
        streams: Number of streams S.
        device: Of the tokens held.
        dtype: Of the tokens held, and of the frames; or `"int8"` or `"int4"`: tokens of frames of any floating dtype
            are stored as `quantize_slots` does and come back as float32. Decisions look at means in full precision.
        key_dim: Similarity looks at the first `key_dim` channels; None = all.
        adapter: Module applied to frames first, for example `FeatureAdapter` where feature sizes differ.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacities: Sequence[int],
        grids: Sequence[tuple[int, int] | None],
        rule: str,
        *,
        intervals: Sequence[int] | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        key_dim: int | None = None,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._lock = MemoryLock()
        check_int("dim", dim, low=1)
        check_int("streams", streams, low=1)
        key_dim = dim if key_dim is None else key_dim
        check_int("key_dim", key_dim, low=1, high=dim)
        self.layout, self.levels = make_layout(dim, grid, capacities, grids, rule, intervals, key_dim)
        self.streams, self.adapter = streams, adapter
        made = new_state(self.layout, streams, device, dtype)
        for name, buffer in made._asdict().items():
            self.register_buffer(name, buffer, persistent=False)
        for name, table in self._constants().items():
            self.register_buffer(name, table.to(device), persistent=False)

    # writing

    @torch.no_grad()
    @locked
    def push(
        self, frames: Tensor, time: Times = None, *, valid: Tensor | None = None, streams: Tensor | None = None
    ) -> None:
        """Take frames in, oldest first. No host synchronisation; a failed push changes nothing.

        Args:
            frames: `[S, T, H, W, D]`, or `[T, H, W, D]` for one stream, in the bank's dtype and on its device.
            time: Seconds, `[T]` or `[S, T]` float64 or a float for T = 1, strictly increasing; None = unknown (NaN).
                Frames are numbered from 0 per stream all the same.
            valid: `[S, T, H, W]` or `[T, H, W]` bool, cells that exist; others are never read.
            streams: `[S']` int64, the stream each row of `frames` belongs to, −1 = skip the row; None = all in order.

        Raises:
            ValueError: A shape, dtype or device does not fit, or times known to the host do not increase.
        """
        frames, valid, times = self._arrange(frames, time, valid)
        if streams is not None:
            check_rows(streams, self.streams)
        if times is not None:
            check_seconds(times, (self.clock[..., STOP], self.entry[..., FRAME] >= 0), streams)
            times = on_device(times, frames.device)
        state = self.state
        check_push(state, self.layout, frames, times, valid, streams)
        if self._archive is None:
            self._write(state, frames, times, valid, streams)
        else:
            self._archive.check_usable()
            for t in range(frames.shape[1]):
                frame, when, there = _frame(t, frames, times, valid)
                with self._archive.taking(), unbroken():
                    self._write_archived(self._archive, state, frame, when, there, streams)

    # the state's tokens take part in `choose`, and not what is known of each entry alone
    reads_tokens = False

    def choose(self, state: BankState, frames: Tensor, valid: Tensor | None) -> Tensor:
        """Choose the slot `[S]` or `[S, tiers]` int64 that a full tier gives up to the next frame of each stream.

        The rule of the layout chooses where a policy does not. Looks at tensors only and does not wait for a device.

        Args:
            state: Before the frame, a row for each row of `frames`; without tokens unless `reads_tokens`.
            frames: `[S, H, W, D]` the frames that come in.
            valid: `[S, H, W]` bool cells that exist, None = all.
        """
        raise NotImplementedError

    def _chosen(self, state: BankState, frames: Tensor, valid: Tensor | None, streams: Tensor | None) -> Tensor | None:
        """What `choose` says of frames `[S', 1, H, W, D]`, as `bank_push_` takes it: `[S', 1, tiers]`."""
        if type(self).choose is Bank.choose or not state.order.shape[1]:
            return None
        if streams is not None:
            row, tokens = streams.clamp(0, self.streams - 1), ("slots", "mass", "scale")
            fields = [n for n in BankState._fields if self.reads_tokens or n not in tokens]
            state = state._replace(**{name: getattr(state, name).index_select(0, row) for name in fields})
        slot = self.choose(state, frames[:, 0], None if valid is None else valid[:, 0])
        return slot.view(frames.shape[0], 1, state.counter.shape[1] - LENGTH)

    def _write(
        self, state: BankState, frames: Tensor, times: Tensor | None, valid: Tensor | None, streams: Tensor | None
    ) -> None:
        layout, maps = self.layout, self.maps
        if type(self).choose is Bank.choose:
            bank_push_(state, layout, frames, time=times, valid=valid, streams=streams, maps=maps)
            return
        for t in range(frames.shape[1]):
            frame, when, there = _frame(t, frames, times, valid)
            victim = self._chosen(state, frame, there, streams)
            bank_push_(state, layout, frame, time=when, valid=there, streams=streams, victim=victim, maps=maps)

    def _write_archived(
        self,
        archive: Archive,
        state: BankState,
        frame: Tensor,
        time: Tensor | None,
        valid: Tensor | None,
        streams: Tensor | None,
    ) -> None:
        """Take in a frame `[S', 1, H, W, D]` of each stream; what leaves for it, or the frame itself, is archived."""
        victim = self._chosen(state, frame, valid, streams)
        if archive.keep == "frames":
            archive.box.add_frames(state, frame, time, valid, streams)
        elif self.layout.slots:
            step = bank_decide(state, self.layout, streams=streams, victim=None if victim is None else victim[:, 0])
            archive.box.add_slots(state, step.evicted(), streams)
            victim = step.leaves[:, None]
        bank_push_(state, self.layout, frame, time=time, valid=valid, streams=streams, victim=victim, maps=self.maps)
        archive.pushed(frame.shape[0])

    def _plan(
        self, frames: Tensor, layout: BankLayout, times: Tensor | None, valid: Tensor | None, maps: Tensor
    ) -> BankPlan:
        if type(self).choose is Bank.choose:
            return bank_plan(frames, layout, time=times, valid=valid, maps=maps)
        (S, T), frames = frames.shape[:2], frames.detach()
        state = layout.new_state(S, frames.device, frames.dtype)
        assign = torch.full((S, T), -1, dtype=torch.int64, device=frames.device)
        for t in range(T):
            frame, when, there = _frame(t, frames, times, valid)
            victim = self._chosen(state, frame, there, None)
            step = bank_decide(state, layout, victim=None if victim is None else victim[:, 0])
            bank_push_(state, layout, frame, time=when, valid=there, victim=step.leaves[:, None], maps=maps)
            for tier in reversed(range(layout.tiers)):
                gone = (assign == step.leaves[:, tier, None]) & (assign >= 0)
                into = torch.where(step.merged >= 0, step.merged, step.target[:, tier])
                assign = torch.where(gone, into[:, None], assign)
            assign[:, t] = step.fresh
        return BankPlan(*state[2:9], assign, frames.new_empty((S, T, 0, layout.dim)))

    def _arrange(
        self, frames: Tensor, time: Times, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: expected a tensor [S, T, H, W, D] or [T, H, W, D], got {type(frames).__name__}")
        if frames.dim() not in (4, 5):
            raise ValueError(f"frames: expected [S, T, H, W, D] or [T, H, W, D], got shape {shape_of(frames)}")
        if self.adapter is not None:
            frames = self.adapter(frames)
        if frames.dim() == 4:
            frames, valid = frames[None], None if valid is None else valid[None]
        S, T = frames.shape[:2]
        if time is None:
            return frames, valid, None
        return frames, valid, as_times(time, S, T)

    # reading

    def compress(self, clip: Tensor, time: Times = None, *, valid: Tensor | None = None) -> MemoryTokens:
        """What a fresh bank would hold after `clip`, without touching this one; gradients reach the clip.

        The whole clip is read once to decide, then each survivor is reduced straight to the size it ends with. Nothing
        is stored, so what a bank in 8 or 4 bits gives here is not rounded.

        Args:
            clip, time, valid: As `frames`, `time`, `valid` of `push`. `[T, H, W, D]` gives a compact result,
                `[S, T, H, W, D]` a padded one.
        """
        frames, valid, times = self._arrange(clip, time, valid)
        if times is not None:
            check_seconds(times)
            times = on_device(times, frames.device)
        layout = clamped(self.layout, frames.shape[1])
        # a bank on the meta device holds nothing, and only compresses
        whole = layout == self.layout and self.maps.device == frames.device
        maps = self.maps if whole and not self.quantized else layout_maps(layout, frames)
        plan = self._plan(frames, layout, times, valid, maps)
        slots, mass = bank_gather(frames, plan, layout, valid=valid, maps=maps)
        tables = (
            self._tables() if whole else {k: t.to(slots.device) for k, t in row_tables(layout, self.levels).items()}
        )
        tokens = padded_tokens(slots, mass, plan.entry, plan.clock, tables, self._cells)
        return compact_tokens(tokens, 0) if clip.dim() == 4 else tokens


def _frame(
    t: int, frames: Tensor, times: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The t-th frame of each stream, `[S, 1, ...]`."""
    part = slice(t, t + 1)
    return frames[:, part], None if times is None else times[:, part], None if valid is None else valid[:, part]
