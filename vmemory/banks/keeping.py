"""What can be done with a memory's state as a whole: copies, files, branches, and taking a span of time out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmemory.banks.erase import BLIND, check_span, inside, is_whole, keep_only_, live_slots
from vmemory.banks.files import BankFile
from vmemory.banks.quantized import QuantizedState
from vmemory.ops._checks import check_int, shape_of
from vmemory.reference.bank_layout import FRAME, STOP, BankLayout, BankState

Kept = TypeVar("Kept", bound="Keeping")


class Preserving(nn.Module):
    """A memory whose state can be copied and put back."""

    def snapshot(self) -> Any:
        raise NotImplementedError

    def restore(self, snapshot: Any) -> None:
        raise NotImplementedError

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Warm-up, compilation or graph capture inside leave no trace: the state is put back at the end."""
        before = self.snapshot()
        try:
            yield
        finally:
            self.restore(before)


class Keeping(Preserving):
    """The part of `Bank` that treats its state as a whole."""

    policy: str
    layout: BankLayout
    streams: int
    entry: Tensor
    clock: Tensor
    _state_type: type[BankState] | type[QuantizedState]

    @property
    def state(self) -> BankState | QuantizedState:
        """The state tensors themselves, not copies."""
        return self._state_type(*(getattr(self, name) for name in self._state_type._fields))

    @property
    def quantized(self) -> bool:
        """Whether tokens are stored in 8 or 4 bits."""
        return self._state_type is QuantizedState

    def snapshot(self) -> BankState | QuantizedState:
        """A copy of the state; `restore` takes it back."""
        return self._state_type(*(t.clone() for t in self.state))

    def restore(self, snapshot: BankState | QuantizedState) -> None:
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

    def fork(self: Kept, time: float | None = None) -> Kept:
        """A bank of its own that holds the same, or what this one held at second `time`.

        Raises:
            ValueError: A frame that `time` would need has been given up or merged since; take a snapshot in time.
        """
        copy = deepcopy(self)
        if time is None:
            return copy
        check_span(time, time)
        for stream in range(self.streams):
            after = live_slots(self.state, stream) & (self.clock[stream, :, STOP] > time)
            if bool(after.any()):
                if not is_whole(self.state, stream, self.layout):
                    raise ValueError(f"time: expected a second since which nothing was given up, got {time:g} s")
                copy._keep_only(stream, ~after, renumber=True)
        return copy

    @torch.no_grad()
    def erase(self, t0: float, t1: float, stream: int = 0) -> int:
        """Take the span [t0, t1] out of a stream: nothing computed from a frame in it remains, its bytes are zero.

        While every frame is still held by itself, the memory afterwards is the one that never saw the span, frames
        numbered accordingly. Later on it depends on the policy. `"recent"` and `"uniform"` do not look at what frames
        show and give up the span's entries alone. Those that choose by similarity give up every entry that ends at t0
        or later, because the span has had a part in the choice; the episodic memory numbers what is left from 0. The
        reservoir refuses: its draws cannot be undone.

        Args:
            t0, t1: Seconds, both included.
            stream: Which stream.

        Returns:
            How many entries left.

        Raises:
            ValueError: The span is no span, something held has no time, or the policy refuses; nothing has changed.
        """
        check_int("stream", stream, low=0, high=self.streams - 1)
        check_span(t0, t1)
        state, layout = self.state, self.layout
        out, whole = inside(state, stream, t0, t1), is_whole(state, stream, layout)
        if not whole and not self.blind:
            out = live_slots(state, stream) & (state.clock[stream, :, STOP] >= t0)
        gone = int(out.sum())
        if gone:
            self._erase(stream, out, whole)
        return gone

    @property
    def blind(self) -> bool:
        """Whether the policy decides without looking at what frames show."""
        return self.layout.rule in BLIND

    def _erase(self, stream: int, out: Tensor, whole: bool) -> None:
        self._keep_only(stream, ~out, renumber=whole)

    def _keep_only(self, stream: int, keep: Tensor, *, renumber: bool) -> None:
        live = self.entry[stream, :, FRAME] >= 0
        keep_only_(self.state, stream, self.layout, live & keep, renumber=renumber)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, enough to make an empty bank like this one."""
        raise NotImplementedError

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
