"""The base of all policies that hold frames as they came, pooled or merged: push, read, compress and search."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmemory.banks import history
from vmemory.banks.archive.archive import Archive
from vmemory.banks.arguments import Times, as_streams, as_times, check_rows, check_seconds, on_device, with_streams
from vmemory.banks.interrupts import delayed_interrupts
from vmemory.banks.io import BankFile
from vmemory.banks.layout import clamped, make_layout
from vmemory.banks.lock import MemoryLock, alone, locked
from vmemory.banks.quantization import dtype_of, name_of, new_state, read_tokens
from vmemory.banks.results import (
    Entries,
    Frame,
    MemoryTokens,
    SearchResult,
    Tier,
    compact_tokens,
    padded_tokens,
    row_tables,
)
from vmemory.banks.state import check_snapshot, check_state
from vmemory.ops._checks import check_int, check_tensor, shape_of
from vmemory.ops.bank import (
    BankPlan,
    bank_decide,
    check_frames,
    check_push,
    gather_checked,
    layout_maps,
    plan_checked,
    push_checked_,
)
from vmemory.ops.similarity_topk import similarity_topk
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
    TIME,
    BankLayout,
    BankState,
)

# buffers that keep their dtype when a model around them is cast, and those that operators want as wide as the tokens
_KEPT, _WIDE = ("mass", "clock", "scale"), ("descriptor", "norm", "link", "maps")
_TOKENS = ("slots", "mass", "scale")
_Self = TypeVar("_Self", bound="Bank")


# videos of one shape come one after the other, and their tables are only read
_tables_of = lru_cache(maxsize=16)(row_tables)


class Bank(nn.Module):
    """A bounded memory of a frame stream, or of many streams that share a launch.

    State is device tensors of fixed shape, allocated here and changed in place: pushes never synchronise the host,
    can be captured in a CUDA graph and compile without graph breaks. Buffers are not part of `state_dict`; streaming
    state travels by `snapshot` and `save`.

    Any call may come from any thread: calls on one bank take turns. Compiled pushes, replayed graphs and the tensors of
    `state` themselves take no lock.

    Subclasses are policies. One that the rules below do not cover overrides `choose`.

    Args:
        dim: Channels D of a token.
        grid: Token grid (H, W) of the frames that come in.
        capacity: Entries of each tier; a tier of capacity 0 does not exist, its frames go on to the next or leave.
        grid_size: Token grid of each tier, None = the frames' own; never larger than `grid`.
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

    # the state, registered as buffers
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
    maps: Tensor

    # the name of a policy in `vmemory.banks.POLICIES`
    policy = "bank"
    # `choose` reads the tokens of the state, not only what is known of each entry
    reads_tokens = False
    # the constructor's arguments as plain values, set by subclasses
    _config: dict[str, Any]
    _archive: Archive | None = None

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: Sequence[int],
        grid_size: Sequence[tuple[int, int] | None],
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
        # held by every call that reads or changes the state
        self._lock = MemoryLock()
        check_int("dim", dim, low=1)
        check_int("streams", streams, low=1)
        key_dim = dim if key_dim is None else key_dim
        check_int("key_dim", key_dim, low=1, high=dim)
        self.layout, self.levels = make_layout(dim, grid, capacity, grid_size, rule, intervals, key_dim)
        self.dim, self.grid, self.key_dim = dim, self.layout.grid, key_dim
        self.streams, self.adapter = streams, adapter
        self._chooses = type(self).choose is not Bank.choose
        for name, buffer in new_state(self.layout, streams, device, dtype)._asdict().items():
            self.register_buffer(name, buffer, persistent=False)
        for name, table in self._constants().items():
            self.register_buffer(name, table.to(device), persistent=False)

    # facts

    @property
    def state(self) -> BankState:
        """The state tensors themselves, not copies."""
        # attributes of modules are looked up slowly, and every push asks for ten
        return BankState(*map(self._buffers.__getitem__, BankState._fields))  # type: ignore[arg-type]

    @property
    def quantized(self) -> bool:
        """True if tokens are stored in 8 or 4 bits."""
        return not self.slots.dtype.is_floating_point

    @property
    def token_dtype(self) -> torch.dtype | None:
        """The dtype that frames must have; None = any floating dtype."""
        return None if self.quantized else self.slots.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held on the device; constant from construction to the end."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    @property
    def capacity(self) -> int:
        """Entries one stream can hold in all tiers together."""
        return self.layout.slots

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers that exist, first tier first."""
        sizes = self.layout.grids
        names = [f"tier {i + 1}" for i in range(len(sizes))] if len(sizes) > 1 else ["entries"]
        return tuple(Tier(*tier) for tier in zip(names, self.levels, sizes, strict=True))

    @property
    def compares(self) -> bool:
        """True if the content of frames decides which are held, False if their numbers alone do."""
        return RULES[self.layout.rule].choose in ("adjacent", "all")

    def bytes_in_use(self, stream: int = 0) -> int:
        """Return the bytes that the entries of a stream occupy; synchronises the host."""
        state = self.state
        held = self.counter[stream, LENGTH:].tolist()
        rows = sum(n * cells for n, cells in zip(held, self.layout.cells, strict=True))
        per_row = sum(t[0, :1].numel() * t.element_size() for t in (state.slots, state.mass, state.scale))
        facts = (state.descriptor, state.norm, state.entry, state.clock, state.order)
        per_entry = sum(t[0, :1].numel() * t.element_size() for t in facts)
        return rows * per_row + sum(held) * per_entry

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, enough to make an empty bank like this one now."""
        # the dtype may differ from the constructor's, if a model around the bank was cast
        return self._config | ({} if self.quantized else {"dtype": name_of(self.slots.dtype)})

    @property
    def archive(self) -> Archive | None:
        """The archive of frames that leave; None = none. Set it once, after the bank has its device and dtype."""
        return self._archive

    @archive.setter
    @locked
    def archive(self, archive: Archive | None) -> None:
        if archive is not None:
            if not isinstance(archive, Archive):
                raise TypeError(f"archive: expected an Archive or None, got {type(archive).__name__}")
            archive.attach(self.layout, self.levels, self.state)
        self._archive = archive

    # writing

    @torch.no_grad()
    @locked
    def push(
        self, frames: Tensor, time: Times = None, *, mask: Tensor | None = None, streams: Tensor | None = None
    ) -> None:
        """Push frames, oldest first. Does not synchronise the host; a failed push changes nothing.

        Args:
            frames: `[S, T, H, W, D]`, or `[T, H, W, D]` for one stream, in the bank's dtype and on its device.
            time: Seconds, `[T]` or `[S, T]` float64 or a float for T = 1, strictly increasing; None = unknown (NaN).
                Frames are numbered from 0 per stream all the same.
            mask: `[S, T, H, W]` or `[T, H, W]` bool, cells that exist; others are never read.
            streams: `[S']` int64, the stream each row of `frames` belongs to, −1 = skip the row; None = all in order.

        Raises:
            ValueError: A shape, dtype or device does not fit, or times known to the host do not increase.
        """
        frames, mask, times = self._arrange(frames, time, mask)
        if streams is not None:
            check_rows(streams, self.streams)
        if times is not None:
            check_seconds(times, (self.clock[..., STOP], self.entry[..., FRAME] >= 0), streams)
            times = on_device(times, frames.device)
        state = self.state
        check_push(state, self.layout, frames, times, mask, streams)
        if self._archive is None:
            self._write(state, frames, times, mask, streams)
        else:
            self._archive.check_usable()
            for t in range(frames.shape[1]):
                frame, when, there = _frame(t, frames, times, mask)
                with self._archive.taking(), delayed_interrupts():
                    self._write_archived(self._archive, state, frame, when, there, streams)

    def choose(self, state: BankState, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return the slot `[S]` or `[S, tiers]` int64 that a full tier gives up to the next frame of each stream.

        Override it for a policy with a choice of its own; else the rule of the layout chooses. Use tensor operations
        alone, which do not wait for a device. A slot that the tier does not hold, such as −1, leaves it to the rule.

        Args:
            state: Before the frame, a row for each row of `frames`; without tokens unless `reads_tokens`.
            frames: `[S, H, W, D]` the frames that come in.
            mask: `[S, H, W]` bool cells that exist, None = all.
        """
        raise NotImplementedError

    def _chosen(self, state: BankState, frames: Tensor, mask: Tensor | None, streams: Tensor | None) -> Tensor | None:
        """Return the result of `choose` for frames `[S', 1, H, W, D]` as `[S', 1, tiers]`, for `bank_push_`."""
        if not self._chooses or not state.order.shape[1]:
            return None
        if streams is not None:
            row = streams.clamp(0, self.streams - 1)
            fields = [name for name in BankState._fields if self.reads_tokens or name not in _TOKENS]
            state = state._replace(**{name: getattr(state, name).index_select(0, row) for name in fields})
        slot = self.choose(state, frames[:, 0], None if mask is None else mask[:, 0])
        return slot.view(frames.shape[0], 1, state.counter.shape[1] - LENGTH)

    def _write(
        self, state: BankState, frames: Tensor, times: Tensor | None, mask: Tensor | None, streams: Tensor | None
    ) -> None:
        """Push frames without checks."""
        if not self._chooses:
            push_checked_(state, self.layout, frames, times, mask, streams, None, self.maps)
            return
        for t in range(frames.shape[1]):
            frame, when, there = (frames, times, mask) if frames.shape[1] == 1 else _frame(t, frames, times, mask)
            victim = self._chosen(state, frame, there, streams)
            push_checked_(state, self.layout, frame, when, there, streams, victim, self.maps)

    def _write_archived(
        self,
        archive: Archive,
        state: BankState,
        frame: Tensor,
        time: Tensor | None,
        mask: Tensor | None,
        streams: Tensor | None,
    ) -> None:
        """Push a frame `[S', 1, H, W, D]` of each stream, and archive the leaving frame, or the new frame itself."""
        victim = self._chosen(state, frame, mask, streams)
        if archive.keep == "frames":
            archive.box.add_frames(state, frame, time, mask, streams)
        elif self.layout.slots:
            step = bank_decide(state, self.layout, streams=streams, victim=None if victim is None else victim[:, 0])
            archive.box.add_slots(state, step.evicted(), streams)
            victim = step.leaves[:, None]
        push_checked_(state, self.layout, frame, time, mask, streams, victim, self.maps)
        archive.pushed(frame.shape[0])

    def _arrange(self, frames: Tensor, time: Times, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        frames, mask = with_streams(frames, mask)
        if self.adapter is not None:
            frames = self.adapter(frames)
        S, T = frames.shape[:2]
        if time is None:
            return frames, mask, None
        return frames, mask, as_times(time, S, T)

    # reading

    def compress(self, clip: Tensor, time: Times = None, *, mask: Tensor | None = None) -> MemoryTokens:
        """Return the content of a new bank after `clip`, differentiable; this bank does not change.

        The whole clip is read once to decide, then each survivor is pooled directly to its final size. Nothing is
        stored, so the result is not rounded for a bank in 8 or 4 bits.

        Args:
            clip, time, mask: As `frames`, `time`, `mask` of `push`. `[T, H, W, D]` gives a compact result,
                `[S, T, H, W, D]` a padded one.
        """
        frames, mask, times = self._arrange(clip, time, mask)
        if times is not None:
            check_seconds(times)
            times = on_device(times, frames.device)
        layout = clamped(self.layout, frames.shape[1])
        # a bank on the meta device only compresses
        whole = layout == self.layout and self.maps.device == frames.device
        maps = self.maps if whole and not self.quantized else layout_maps(layout, frames)
        check_frames(frames, layout, times, mask)
        decide = self._plan if self._chooses else plan_checked
        plan = decide(frames, layout, times, mask, maps)
        slots, mass = gather_checked(frames, plan, layout, mask, maps)
        tables = (
            self._tables() if whole else {k: t.to(slots.device) for k, t in _tables_of(layout, self.levels).items()}
        )
        tokens = padded_tokens(slots, mass, plan.entry, plan.clock, tables, self.grid[0] * self.grid[1])
        return compact_tokens(tokens, 0) if clip.dim() == 4 else tokens

    def _plan(
        self, frames: Tensor, layout: BankLayout, times: Tensor | None, mask: Tensor | None, maps: Tensor
    ) -> BankPlan:
        """Return what `bank_plan` returns, for a policy that chooses frame by frame."""
        (S, T), frames = frames.shape[:2], frames.detach()
        state = layout.new_state(S, frames.device, frames.dtype)
        assign = torch.full((S, T), -1, dtype=torch.int64, device=frames.device)
        for t in range(T):
            frame, when, there = _frame(t, frames, times, mask)
            victim = self._chosen(state, frame, there, None)
            step = bank_decide(state, layout, victim=None if victim is None else victim[:, 0])
            push_checked_(state, layout, frame, when, there, None, step.leaves[:, None], maps)
            for tier in reversed(range(layout.tiers)):
                gone = (assign == step.leaves[:, tier, None]) & (assign >= 0)
                into = torch.where(step.merged >= 0, step.merged, step.target[:, tier])
                assign = torch.where(gone, into[:, None], assign)
            assign[:, t] = step.fresh
        return BankPlan(*state[2:9], assign, frames.new_empty((S, T, 0, layout.dim)))

    @locked
    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens:
        """Return all tokens held, in stream order, with provenance.

        Args:
            stream: Which stream; ignored by a padded read.
            padded: `[S, Nmax, ...]` of all streams with `count [S]`, without host synchronisation; else one stream,
                compact, at the price of one synchronisation.
        """
        state = self.state
        read = partial(read_tokens, state, dim=self.dim) if state.quantized else None
        cells = self.grid[0] * self.grid[1]
        tokens = padded_tokens(state.slots, state.mass, state.entry, state.clock, self._tables(), cells, read)
        if padded:
            return tokens
        check_int("stream", stream, low=0, high=self.streams - 1)
        return compact_tokens(tokens, stream)

    def _tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("row_slot", "row_cell", "row_level")}

    @locked
    def search(self, query: Tensor, k: int, *, threshold: float | None = None, stream: int = 0) -> SearchResult:
        """Return the entries most similar to each query, by cosine with their means. Does not synchronise the host.

        Args:
            query: `[Q, D]` or `[Q, key_dim]`.
            k: Entries per query.
            threshold: Entries below this cosine are left out.
            stream: Which stream is searched.
        """
        check_tensor("query", query, "[Q, D]")
        if query.shape[1] not in (self.dim, self.layout.key_dim):
            raise ValueError(f"query: expected [Q, {self.layout.key_dim}], got shape {shape_of(query)}")
        check_int("stream", stream, low=0, high=self.streams - 1)
        keys = self._of_own_tier(self.descriptor)[stream]
        found = similarity_topk(
            query[None, :, : self.layout.key_dim].to(keys.dtype),
            keys[None],
            k,
            where=(self.entry[stream, :, FRAME] >= 0)[None],
            norm=self._of_own_tier(self.norm)[stream][None],
        )
        values, slot = found.values[0], found.indices[0]
        if threshold is not None:
            slot = torch.where(values >= threshold, slot, -1)
            values = torch.where(values >= threshold, values, -torch.inf)
        there, at = slot >= 0, slot.clamp_min(0)
        levels = self._of_slots(self.levels)
        if self.layout.slots == 0:
            missing = torch.full_like(slot, -1)
            nan = torch.full(slot.shape, torch.nan, dtype=torch.float64, device=slot.device)
            return SearchResult(values, missing, nan, missing, nan, nan)
        clock = torch.where(there[..., None], self.clock[stream][at], torch.nan)
        return SearchResult(
            values,
            torch.where(there, self.entry[stream, :, FRAME][at], -1),
            clock[..., TIME],
            torch.where(there, levels[at], -1),
            clock[..., START],
            clock[..., STOP],
        )

    def _of_slots(self, of_tiers: Sequence[int]) -> Tensor:
        """Return `[M]` int64, for each slot its tier's number; made on the device, since copies from the host wait."""
        made = [self.entry.new_full((n,), value) for n, value in zip(self.layout.capacities, of_tiers, strict=True)]
        return torch.cat([self.entry.new_empty((0,)), *made])

    def _of_own_tier(self, of_maps: Tensor) -> Tensor:
        """Return each slot's mean or norm as the slot's own tier sees it: `[S, M, R, ...]` to `[S, M, ...]`."""
        if of_maps.shape[2] == 1:
            return of_maps[:, :, 0]
        slot = torch.arange(self.layout.slots, device=of_maps.device)
        return of_maps[:, slot, self._of_slots(range(self.layout.tiers))]

    @locked
    def entries(self, stream: int = 0) -> Entries:
        """Return what a stream holds, entry by entry in stream order; synchronises the host once."""
        check_int("stream", stream, low=0, high=self.streams - 1)
        entry, clock = self.entry[stream], self.clock[stream]
        slots = torch.nonzero(entry[:, FRAME] >= 0).flatten()
        slots = slots[entry[slots, FRAME].argsort()]
        entry, clock = entry[slots], clock[slots]
        return Entries(
            frame=entry[:, FRAME],
            first=entry[:, FIRST],
            last=entry[:, LAST],
            frames=entry[:, FRAMES],
            time=clock[:, TIME],
            start=clock[:, START],
            stop=clock[:, STOP],
            level=self._of_slots(self.levels)[slots],
            descriptor=self._of_own_tier(self.descriptor)[stream, slots],
        )

    @locked
    def counts(self, stream: int = 0) -> dict[str, int]:
        """Return frames `seen`, `skipped` (no interval, or erased), `dropped` and entries `held`; synchronises."""
        counter = self.counter[stream].tolist()
        return {
            "seen": counter[SEEN],
            "skipped": counter[SKIPPED],
            "dropped": counter[DROPPED],
            "held": sum(counter[LENGTH:]),
        }

    # going back

    @locked
    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Remove everything from all streams or from those named, in the archive too; with an archive it synchronises.

        Without `streams` it also fills the constant tables of a bank that `to_empty` moved from the meta device.

        Raises:
            TypeError, ValueError: No such stream; nothing has changed then.
            RuntimeError: The disk does not take the archive's part; it is forgotten here and there all the same.
        """
        which = slice(None) if streams is None else as_streams(streams, self.streams).to(self.entry.device)
        if self._archive is not None:
            for stream in range(self.streams)[which] if isinstance(which, slice) else which.tolist():
                self._archive.forget(stream, None)
        for name in BankState._fields:
            getattr(self, name)[which] = -1 if name in ("entry", "order") else 0
        if streams is None:
            for name, table in self._constants().items():
                getattr(self, name).copy_(table)
        if self._archive is not None:
            self._archive.flush()

    def _constants(self) -> dict[str, Tensor]:
        """Return the buffers that no push changes."""
        tables = row_tables(self.layout, self.levels, self.entry.device)
        return {"maps": layout_maps(self.layout, self.descriptor), **tables}

    @locked
    def snapshot(self) -> BankState:
        """Return a copy of the state, which `restore` takes back."""
        return BankState(*(t.clone() for t in self.state))

    @locked
    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Replace the state by a snapshot of a bank of the same shape; reads its lists, which synchronises the host.

        An archive keeps what has left since and still reads it; `fork` and `erase` no longer take it for this memory's
        past.

        Raises:
            ValueError: The snapshot's shapes or dtypes are not this bank's, or its lists and counters are none that a
                bank has; nothing has changed then.
        """
        self.check(snapshot)
        self._take(snapshot)

    def _take(self, snapshot: tuple[Tensor, ...]) -> None:
        for held, new in zip(self.state, snapshot, strict=True):
            held.copy_(new)
        if self._archive is not None:
            self._archive.branch(self.counter[:, SEEN])

    def check(self, snapshot: tuple[Tensor, ...]) -> None:
        """Check that this bank can hold a snapshot.

        Raises:
            ValueError: Its shapes, dtypes, lists or counters are others.
        """
        check_snapshot(self.state, snapshot)
        assert isinstance(snapshot, BankState)
        if not snapshot.order.is_meta:
            check_state(self.layout, snapshot)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Run a block whose pushes leave no trace: the state comes back, in the same tensors, also after an error.

        For warm-up, compilation and graph capture. Holds a second copy of the state while it lasts. Other threads wait
        for the block to end.
        """
        with alone(self._lock):
            before = self.snapshot()
            with nullcontext() if self._archive is None else self._archive.preserved():
                try:
                    yield
                finally:
                    self._take(before)

    @locked
    def fork(self: _Self, time: float | None = None) -> _Self:
        """Return an independent memory in the state of this one; they share the adapter, which holds no state.

        The archive stays with this one.

        Args:
            time: The state after the last frame of at most so many seconds, in every stream; None = now. Going back
                means taking every frame up to then in again, so each must still be whole: neither dropped nor reduced
                nor merged since it came. Frames that no interval took count as seen once the next one taken was.

        Raises:
            ValueError: `time` is NaN, frames came without times, or frames up to `time` are no longer whole; the
                message says how many.
        """
        twin = copy.deepcopy(self, {id(self.adapter): self.adapter})
        if time is not None:
            for stream, state in history.states_at(self, time):
                twin.set_stream(stream, state)
        return twin

    @torch.no_grad()
    @locked
    def erase(self, t0: float, t1: float, stream: int = 0, *, drop_dependent: bool = False) -> int:
        """Remove the frames from `t0` to `t1`: nothing computed from them stays; freed memory is zeroed.

        If every pushed frame is still whole (not dropped, reduced or merged), all other frames are pushed again, and
        the state is bit-identical to that of a memory which never saw the span. A bank in 8 or 4 bits pushes the
        rounded frames, so later decisions use their means. Otherwise every entry with a part in the span is removed, a
        merged entry completely, because a mean cannot be split. Entries outside the span do not change, because no byte
        of them was computed from the span; cosines between neighbours are computed again. Dropped frames do not return.
        Other frames keep their numbers; erased frames count as skipped. Synchronises the host.

        Args:
            t0, t1: Seconds, both inclusive.
            stream: Which stream.
            drop_dependent: If the past cannot be repeated, also remove every entry since `t0`, provided that frames of
                the span were seen. In policies that compare frames (hierarchical, merging, episodic) the frames of the
                span influenced which other frames stayed. Other policies (recent, uniform, reservoir) decide by number
                only, and keep these entries in any case.

        Returns:
            Number of entries removed.

        Raises:
            TypeError, ValueError: `t0` is above `t1` or NaN, the stream or setting does not exist, or frames have no
                times; nothing has changed.
            RuntimeError: The archive's file was altered, and nothing has changed; or it cannot be written: the span is
                erased from memory and archive, but may remain on the disk.
        """
        return history.erase(self, t0, t1, stream, drop_dependent)

    def set_stream(self, stream: int, state: BankState) -> None:
        """Replace one stream by a state of one stream of the same layout."""
        for held, new in zip(self.state, state, strict=True):
            held[stream] = new[0]

    @torch.no_grad()
    def replayed(self, frames: list[Frame], seen: int) -> BankState:
        """Return the state of one stream that took in these frames out of `seen`; the others count as skipped."""
        config = self.to_dict() | {"streams": 1, "device": self.slots.device}
        config["dtype"] = dtype_of(config["dtype"])
        twin = type(self)(**config)

        def skip_to(number: int) -> None:
            gap = number - int(twin.counter[0, SEEN])
            twin.counter[0, SEEN] += gap
            twin.counter[0, SKIPPED] += gap

        for frame in frames:
            skip_to(frame.number)
            time = torch.full((1, 1), frame.time, dtype=torch.float64, device=frame.tokens.device)
            mask = None if frame.mask is None else frame.mask[None, None]
            twin._write(twin.state, frame.tokens[None, None].contiguous(), time, mask, None)
        skip_to(seen)
        return twin.state

    # keeping

    def save(
        self, path: str | Path, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write the state to a `.vmem` file (safetensors); a file that exists survives until the new one is whole.

        Args:
            path: Where to write. One copy of the state is taken first; other threads may push while it is written.
            extra: Further tensors to keep with the memory, for example thumbnails.
            notes: Further plain values, stored as JSON.

        Raises:
            OSError: The disk does not take it.
            ValueError: At `path` there is something else than a file.
        """
        self.to_file(extra, notes).write(Path(path))

    @locked
    def to_file(self, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None) -> BankFile:
        """Return what `save` writes: a copy of the state, with `extra` and `notes` as they are."""
        return BankFile(self.policy, self.to_dict(), self.snapshot()._asdict(), extra or {}, notes or {})

    @locked
    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        if self._archive is not None:
            self._archive.check_dtype(fn(self.slots.new_empty(0)).dtype)
        kept = {name: getattr(self, name) for name in _KEPT + _WIDE if hasattr(self, name)}
        super()._apply(fn, recurse)
        wide = torch.promote_types(self.slots.dtype, torch.float32)
        for name, old in kept.items():
            new, kind = getattr(self, name), wide if name in _WIDE else old.dtype
            if new.dtype != kind:
                setattr(self, name, old.to(new.device, kind))
        if self.maps.dtype != kept["maps"].dtype:
            self.maps = layout_maps(self.layout, self.slots)
        if self._archive is not None:
            self._archive.moved(self.state)
        return self


def _frame(
    t: int, frames: Tensor, times: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the t-th frame of each stream, `[S, 1, ...]`."""
    part = slice(t, t + 1)
    return frames[:, part], None if times is None else times[:, part], None if mask is None else mask[:, part]
