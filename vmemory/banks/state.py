"""The state of a bank and all that keeps, copies, restores or erases it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmemory.banks.archive import Archive
from vmemory.banks.erase import Frame, check_times, may_have_seen, whole_frames, without
from vmemory.banks.files import BankFile
from vmemory.banks.quantized import AnyState, QuantizedState, dtype_of
from vmemory.banks.tokens import MemoryTokens
from vmemory.ops._checks import check_choice, check_int, shape_of
from vmemory.reference.bank_layout import FRAME, RULES, SEEN, SKIPPED, START, STOP, BankLayout, BankState

# buffers that keep their dtype when a model around them is cast
_KEPT = ("mass", "descriptor", "norm", "link", "clock", "maps", "scale")
_Self = TypeVar("_Self", bound="StateModule")


class StateModule(nn.Module):
    """What every bank can do with its state, whatever its policy."""

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
    maps: Tensor
    # BankState, or QuantizedState where tokens are stored in 8 or 4 bits
    _state_type: type[BankState] | type[QuantizedState]

    layout: BankLayout
    levels: tuple[int, ...]
    streams: int
    adapter: nn.Module | None
    _archive: Archive | None = None

    # what saving needs beside the layout; subclasses name themselves in vmemory.banks.POLICIES
    policy = "bank"

    @property
    def state(self) -> AnyState:
        """The state tensors themselves, not copies."""
        return self._state_type(*(getattr(self, name) for name in self._state_type._fields))

    @property
    def quantized(self) -> bool:
        """Whether tokens are stored in 8 or 4 bits."""
        return self._state_type is QuantizedState

    def _plain_state(self) -> BankState:
        state = self.state
        assert isinstance(state, BankState), "an archive takes no bank in 8 or 4 bits"
        return state

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: constant from construction to the end."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    @property
    def capacity(self) -> int:
        """Entries one stream can hold."""
        return self.layout.slots

    @property
    def compares(self) -> bool:
        """Whether what frames show decides which frames are held; else their numbers alone do."""
        return RULES[self.layout.rule].choose in ("adjacent", "all")

    @property
    def archive(self) -> Archive | None:
        """Where what leaves goes; None = nowhere. Set it, once, after the bank has got its device and dtype."""
        return self._archive

    @archive.setter
    def archive(self, archive: Archive | None) -> None:
        if archive is not None:
            if self.quantized:
                raise ValueError(f"archive: expected a bank of a floating dtype, got {self.config()['dtype']}")
            archive.attach(self.layout, self.levels, self.slots)
        self._archive = archive

    def recall(self, t0: float, t1: float, stream: int = 0) -> MemoryTokens:
        """What the archive holds of `t0` to `t1` seconds, both inclusive; see `Archive.recall`.

        Raises:
            ValueError: `t0` above `t1` or NaN, no such stream, or a bank without an archive.
        """
        check_int("stream", stream, low=0, high=self.streams - 1)
        if self._archive is None:
            raise ValueError("archive: expected a bank with an archive, got one without")
        return self._archive.recall(t0, t1, stream)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        kept = {name: getattr(self, name) for name in _KEPT if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        if self._archive is not None:
            self._archive.moved(self.slots)
        return self

    def _write(self, frames: Tensor, times: Tensor | None, valid: Tensor | None, streams: Tensor | None) -> None:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, enough to make an empty bank like this one."""
        raise NotImplementedError

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Forget everything, of all streams or of those named."""
        which = (
            slice(None) if streams is None else torch.tensor(list(streams), dtype=torch.int64, device=self.entry.device)
        )
        for name in self._state_type._fields:
            getattr(self, name)[which] = -1 if name in ("entry", "order") else 0

    def snapshot(self) -> AnyState:
        """A copy of the state; `restore` takes it back."""
        return self._state_type(*(t.clone() for t in self.state))

    def restore(self, snapshot: AnyState) -> None:
        """Go back to a snapshot of a bank of the same shape.

        Raises:
            ValueError: The snapshot's shapes or dtypes are not this bank's; nothing has changed then.
        """
        if type(snapshot) is not self._state_type:
            raise ValueError(f"snapshot: expected {self._state_type.__name__}, got {type(snapshot).__name__}")
        for name, held, new in zip(self._state_type._fields, self.state, snapshot, strict=True):
            if held.shape != new.shape or held.dtype != new.dtype:
                raise ValueError(
                    f"snapshot.{name}: expected {shape_of(held)} {held.dtype}, got {shape_of(new)} {new.dtype}"
                )
        for held, new in zip(self.state, snapshot, strict=True):
            held.copy_(new)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Pushes within the block leave no trace: the state comes back, in the same tensors, also after an error.

        For warm-up, compilation and graph capture, which push frames that nobody is to remember. Holds a second copy
        of the state while it lasts.
        """
        before = self.snapshot()
        with nullcontext() if self._archive is None else self._archive.preserved():
            try:
                yield
            finally:
                self.restore(before)

    def fork(self: _Self, time: float | None = None) -> _Self:
        """An independent memory in the state of this one; the adapter, which holds weights and no state, is shared.

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
        if time is None:
            return twin
        if math.isnan(time):
            raise ValueError("time: expected seconds, got NaN")
        for s in range(self.streams):
            check_times(self.clock[s], self.entry[s])
            frames = self._at_hand(s, all_or_none=False)
            seen = int(self.counter[s, SEEN])
            after = min((n for n, frame in frames.items() if frame.time > time), default=seen)
            if not bool(((self.clock[s, :, STOP] > time) & (self.entry[s, :, FRAME] >= 0)).any()) and after == seen:
                continue
            needed = {n for n in range(after) if self.layout.entry_tier(n) >= 0}
            missing = needed - frames.keys()
            if missing and len(frames) != self._taken(s):
                raise ValueError(
                    f"time: expected every frame up to {time} s of stream {s} to be whole still, got {len(missing)} of "
                    f"{len(needed)} dropped, reduced or merged since"
                )
            kept = [frames[n] for n in sorted(frames) if n < after]
            twin._put(s, self._replayed(kept, kept[-1].number + 1 if kept else 0))
        return twin

    @torch.no_grad()
    def erase(self, t0: float, t1: float, stream: int = 0, *, survivors: str = "clear") -> int:
        """Forget the frames from `t0` to `t1`: nothing computed from them stays; what becomes free is zeroed.

        Where every frame taken in is still whole (neither dropped nor reduced nor merged), the others are taken in
        again, and the state is that of a memory which never saw the span, to the bit. Else entries with a part in the
        span are removed whole (merged ones too, with what they hold of other frames) and nothing that was dropped
        comes back. Other frames keep their numbers; those erased count as skipped. Synchronises the host.

        Args:
            t0, t1: Seconds, both inclusive.
            stream: Which stream.
            survivors: Policies that compare frames (hierarchical, merging, episodic) let the frames of the span decide
                which others stay. Where the past cannot be repeated, `"clear"` therefore removes every entry since
                `t0` too, if frames of the span can have been seen; `"keep"` removes only what was computed from the
                span. The others (recent, uniform, reservoir) decide by number alone, and always keep.

        Returns:
            Entries removed from what was held.

        Raises:
            TypeError, ValueError: `t0` above `t1` or NaN, no such stream or setting, or frames that came without a
                time; nothing has changed then.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        check_int("stream", stream, low=0, high=self.streams - 1)
        check_choice("survivors", survivors, ("clear", "keep"))
        check_times(self.clock[stream], self.entry[stream])
        live = self.entry[stream, :, FRAME] >= 0
        hit = live & (self.clock[stream, :, START] <= t1) & (self.clock[stream, :, STOP] >= t0)
        if self._archive is not None:
            self._archive.check_times(stream)
        frames = self._at_hand(stream, all_or_none=True)
        if len(frames) == self._taken(stream):
            kept = [frames[n] for n in sorted(frames) if not t0 <= frames[n].time <= t1]
            state = self._replayed(kept, int(self.counter[stream, SEEN])) if len(kept) < len(frames) else None
            if self._archive is not None:
                self._archive.erase(t0, t1, stream)
                stored = self._archive.whole_frames(stream, set(), None).keys()
                held = whole_frames(self.state if state is None else state, self.layout, stream if state is None else 0)
                lost = [frame for frame in kept if frame.number not in held.keys() | stored]
                self._archive.put_frames(stream, lost)
            if state is not None:
                self._put(stream, state)
            return int(hit.sum())
        touched = bool(hit.any()) or may_have_seen(self.state, stream, t0, t1)
        if touched and self.compares and survivors == "clear":
            hit = live & (self.clock[stream, :, STOP] >= t0)
        state = without(self.state, self.layout, stream, hit) if bool(hit.any()) else None
        if self._archive is not None:
            self._archive.erase(t0, t1, stream)
        if state is not None:
            self._put(stream, state)
        return int(hit.sum())

    def _taken(self, stream: int) -> int:
        return int(self.counter[stream, SEEN] - self.counter[stream, SKIPPED])

    def _at_hand(self, stream: int, *, all_or_none: bool) -> dict[int, Frame]:
        """Frames of a stream that are still as they came, here or in the archive, by number."""
        frames = whole_frames(self.state, self.layout, stream)
        if self._archive is not None:
            taken = self._taken(stream) if all_or_none else None
            archived = frames | self._archive.whole_frames(stream, set(frames), taken)
            seen = int(self.counter[stream, SEEN])
            known = {n: archived[n] for n in sorted(archived) if n < seen}
            # times that do not increase tell of frames from before a reset
            if all(a.time < b.time for a, b in pairwise(known.values())):
                frames = known
        return {n: frame for n, frame in frames.items() if self.layout.entry_tier(n) >= 0}

    def _put(self, stream: int, state: AnyState) -> None:
        for held, new in zip(self.state, state, strict=True):
            held[stream] = new[0]

    @torch.no_grad()
    def _replayed(self, frames: list[Frame], seen: int) -> AnyState:
        """The state of one stream that took in these frames out of `seen`; the others count as skipped."""
        config = self.config() | {"streams": 1, "device": self.slots.device}
        config["dtype"] = dtype_of(config["dtype"]) if self.quantized else self.slots.dtype
        twin = type(self)(**config)

        def skip_to(number: int) -> None:
            gap = number - int(twin.counter[0, SEEN])
            twin.counter[0, SEEN] += gap
            twin.counter[0, SKIPPED] += gap

        for frame in frames:
            skip_to(frame.number)
            time = torch.full((1, 1), frame.time, dtype=torch.float64, device=frame.tokens.device)
            valid = None if frame.valid is None else frame.valid[None, None]
            twin._write(frame.tokens[None, None].contiguous(), time, valid, None)
        skip_to(seen)
        return twin.state

    def save(
        self, path: str | Path, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write the state to a `.vmem` file (safetensors); a file that exists survives until the new one is whole.

        Args:
            path: Where to write.
            extra: Further tensors to keep with the memory, for example thumbnails.
            notes: Further plain values, stored as JSON.
        """
        BankFile(self.policy, self.config(), self.state._asdict(), extra or {}, notes or {}).write(Path(path))
