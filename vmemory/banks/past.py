"""What a bank does with its past: pushes that leave no trace, branches, and spans that are forgotten."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from vmemory.banks.erase import Frame, check_times, may_have_seen, whole_frames, without
from vmemory.banks.lock import alone, locked
from vmemory.banks.quantized import dtype_of
from vmemory.banks.state import StateModule
from vmemory.ops._checks import check_choice, check_int
from vmemory.reference.bank_layout import FRAME, SEEN, SKIPPED, START, STOP, BankState

_Self = TypeVar("_Self", bound="PastModule")


class PastModule(StateModule):
    """A bank that goes back, branches off and forgets by taking frames in again."""

    def _write(
        self, state: BankState, frames: Tensor, times: Tensor | None, valid: Tensor | None, streams: Tensor | None
    ) -> None:
        raise NotImplementedError

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Pushes within the block leave no trace: the state comes back, in the same tensors, also after an error.

        For warm-up, compilation and graph capture, which push frames that nobody is to remember. Holds a second copy
        of the state while it lasts. Other threads wait for the block to end.
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
    @locked
    def erase(self, t0: float, t1: float, stream: int = 0, *, survivors: str = "keep") -> int:
        """Forget the frames from `t0` to `t1`: nothing computed from them stays; what becomes free is zeroed.

        Where every frame taken in is still whole (neither dropped nor reduced nor merged), the others are taken in
        again, and the state is that of a memory which never saw the span, to the bit; a bank in 8 or 4 bits takes in
        the rounded frames, so that later decisions rest on the means of these. Else every entry with a part in the
        span goes whole: a merged one with what it holds of other frames, since a mean cannot be taken apart. Entries
        wholly outside stay as they are, for no byte of them was computed from the span; cosines between neighbours
        are computed anew. Nothing that was dropped comes back. Other frames keep their numbers; those erased count as
        skipped. Synchronises the host.

        Args:
            t0, t1: Seconds, both inclusive.
            stream: Which stream.
            survivors: Which of the entries outside the span stay where the past cannot be repeated. `"keep"`: all.
                Policies that compare frames (hierarchical, merging, episodic) let the frames of the span decide which
                others stayed, so that their choice still tells a little of it; `"clear"` therefore removes every entry
                since `t0` too, if frames of the span can have been seen. The others (recent, uniform, reservoir)
                decide by number alone, and always keep.

        Returns:
            Entries removed from what was held.

        Raises:
            TypeError, ValueError: `t0` above `t1` or NaN, no such stream or setting, or frames that came without a
                time; nothing has changed then.
            RuntimeError: The archive's file was altered, and nothing has changed; or the disk does not take its part,
                and the span is forgotten here and there, while the disk may still hold it.
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
        rows: list[tuple[Tensor, ...]] = []
        if len(frames) == self._taken(stream):
            kept = [frames[n] for n in sorted(frames) if not t0 <= frames[n].time <= t1]
            state = self._replayed(kept, int(self.counter[stream, SEEN])) if len(kept) < len(frames) else None
            if self._archive is not None and state is not None:
                there = whole_frames(state, self.layout, 0).keys() | self._archive.whole_numbers(stream)
                rows = self._archive.rows_of(stream, [frame for frame in kept if frame.number not in there])
            removed = hit
        else:
            touched = bool(hit.any()) or may_have_seen(self.state, stream, t0, t1)
            removed = hit
            if touched and self.compares and survivors == "clear":
                removed = live & (self.clock[stream, :, STOP] >= t0)
            state = without(self.state, self.layout, stream, removed) if bool(removed.any()) else None
        # all that may fail has been done; from here on what goes goes everywhere, and the disk comes last
        if self._archive is not None:
            self._archive.forget(stream, (t0, t1))
        if state is not None:
            self._put(stream, state)
        if self._archive is not None:
            self._archive.put(rows)
            self._archive.flush()
        return int(removed.sum())

    def _taken(self, stream: int) -> int:
        return int(self.counter[stream, SEEN] - self.counter[stream, SKIPPED])

    def _at_hand(self, stream: int, *, all_or_none: bool) -> dict[int, Frame]:
        """Frames of a stream that are still as they came, here or in the archive, by number."""
        frames = whole_frames(self.state, self.layout, stream)
        if self._archive is not None:
            taken = self._taken(stream) if all_or_none else None
            frames |= self._archive.whole_frames(stream, set(frames), taken)
        return {n: frame for n, frame in frames.items() if self.layout.entry_tier(n) >= 0}

    def _put(self, stream: int, state: BankState) -> None:
        for held, new in zip(self.state, state, strict=True):
            held[stream] = new[0]

    @torch.no_grad()
    def _replayed(self, frames: list[Frame], seen: int) -> BankState:
        """The state of one stream that took in these frames out of `seen`; the others count as skipped."""
        config = self.config() | {"streams": 1, "device": self.slots.device}
        config["dtype"] = dtype_of(config["dtype"])
        twin = type(self)(**config)

        def skip_to(number: int) -> None:
            gap = number - int(twin.counter[0, SEEN])
            twin.counter[0, SEEN] += gap
            twin.counter[0, SKIPPED] += gap

        for frame in frames:
            skip_to(frame.number)
            time = torch.full((1, 1), frame.time, dtype=torch.float64, device=frame.tokens.device)
            valid = None if frame.valid is None else frame.valid[None, None]
            twin._write(twin.state, frame.tokens[None, None].contiguous(), time, valid, None)
        skip_to(seen)
        return twin.state
