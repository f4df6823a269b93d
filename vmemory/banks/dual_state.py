"""State of the dual memory: slots with their projected keys and values, what they hold, and counters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vmemory.banks.budget import largest_entries
from vmemory.banks.checks import check_dual_state
from vmemory.banks.lock import MemoryLock, alone, locked
from vmemory.banks.streams import as_streams
from vmemory.ops._checks import check_int, shape_of


class DualState(NamedTuple):
    """State tensors of S streams, L_w working and L_e episodic slots of n tokens; a snapshot is one of these.

    working_tokens, working_keys, working_values `[S, L_w, n, D]`, working_means `[S, L_w, D]` float32 or better and
    working_rest `[S, L_w, n, E]`, channels that ride behind the tokens; episodic_* the same with L_e; mass
    `[S, L_w + L_e, n]` float32 input cells a token stands for, 0 = the token does not exist; entry `[S, L_w + L_e]`
    int64 frame of each slot, −1 = free; clock `[S, L_w + L_e]` float64 seconds; seen, entered, written `[S]` int64
    frames that came, that entered the working and that entered the episodic memory; overwrites `[S, L_e]` int64.
    """

    working_tokens: Tensor
    working_keys: Tensor
    working_values: Tensor
    working_means: Tensor
    working_rest: Tensor
    episodic_tokens: Tensor
    episodic_keys: Tensor
    episodic_values: Tensor
    episodic_means: Tensor
    episodic_rest: Tensor
    mass: Tensor
    entry: Tensor
    clock: Tensor
    seen: Tensor
    entered: Tensor
    written: Tensor
    overwrites: Tensor

    def clear_(self, which: slice | Tensor = slice(None)) -> None:
        for name, x in self._asdict().items():
            x[which] = -1 if name == "entry" else torch.nan if name == "clock" else 0

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self)

    def until_(self, stream: int, time: float, *, included: bool) -> int:
        """Zero every slot of a stream written after second `time`, pack the others; how many left.

        Raises:
            ValueError: Something held has no time.
        """
        entry, clock = self.entry[stream].clone(), self.clock[stream].clone()
        live = entry >= 0
        if bool((live & clock.isnan()).any()):
            raise ValueError("time: frames that were pushed without times cannot be found by time")
        gone = live & ((clock > time) if included else (clock >= time))
        if not bool(gone.any()):
            return 0
        old = DualState(*(x[stream].clone() for x in self))
        self.clear_(torch.tensor([stream], device=entry.device))
        working = self.working_tokens.shape[1]
        for side, first, last in (("working", 0, working), ("episodic", working, len(entry))):
            kept = torch.nonzero((live & ~gone)[first:last]).flatten()
            kept = kept[entry[first:last][kept].argsort()] if side == "working" else kept
            for name in ("tokens", "keys", "values", "means", "rest"):
                getattr(self, f"{side}_{name}")[stream, : len(kept)] = getattr(old, f"{side}_{name}")[kept]
            for name in ("mass", "entry", "clock"):
                getattr(self, name)[stream, first : first + len(kept)] = getattr(old, name)[first + kept]
            (self.entered if side == "working" else self.written)[stream] = len(kept)
            if side == "episodic":
                self.overwrites[stream, : len(kept)] = old.overwrites[kept]
        self.seen[stream] = entry[gone].min()
        return int(gone.sum())


Holder = TypeVar("Holder", bound="DualStateHolder")
# never narrower than float32 when a model around them is cast
KEPT = ("working_means", "episodic_means", "mass", "clock")


def split(entries: int) -> tuple[int, int]:
    """Slots of the working and the episodic memory out of so many: one to four, as in the paper's best setting."""
    working = max(entries // 5, min(entries, 1))
    return working, entries - working


def new_state(
    streams: int,
    capacities: tuple[int, int],
    tokens: int,
    dim: int,
    device: torch.device | str,
    dtype: torch.dtype,
    rest: int = 0,
) -> DualState:
    """An empty memory; `rest` = channels that ride behind the `dim` of a token."""
    L_w, L_e = capacities
    wide = torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(streams, *shape, dtype=kind, device=device)

    def slots(L: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        held, keys, values = (zeros(L, tokens, dim, kind=dtype) for _ in range(3))
        return held, keys, values, zeros(L, dim, kind=wide), zeros(L, tokens, rest, kind=dtype)

    state = DualState(
        *slots(L_w),
        *slots(L_e),
        mass=zeros(L_w + L_e, tokens, kind=torch.float32),
        entry=zeros(L_w + L_e),
        clock=zeros(L_w + L_e, kind=torch.float64),
        seen=zeros(),
        entered=zeros(),
        written=zeros(),
        overwrites=zeros(L_e),
    )
    state.clear_()
    return state


def capacities_within(
    budget: str | int, streams: int, tokens: int, dim: int, dtype: torch.dtype, rest: int = 0
) -> tuple[int, int]:
    """The most slots, one in five working, of which a memory holds no more bytes than its budget.

    Raises:
        ValueError: No slot fits.
    """

    def nbytes(entries: int) -> int:
        # tensors on the meta device have sizes and no memory; three int64 facts stand beside each token
        state = new_state(streams, split(entries), tokens, dim, "meta", dtype, rest)
        return state.nbytes + 3 * 8 * entries * tokens

    return split(largest_entries(budget, 1, nbytes))


class DualStateHolder(nn.Module):
    """A module that holds a `DualState` in buffers, which are not part of `state_dict`."""

    # the state, registered as buffers
    working_tokens: Tensor
    working_keys: Tensor
    working_values: Tensor
    working_means: Tensor
    working_rest: Tensor
    episodic_tokens: Tensor
    episodic_keys: Tensor
    episodic_values: Tensor
    episodic_means: Tensor
    episodic_rest: Tensor
    mass: Tensor
    entry: Tensor
    clock: Tensor
    seen: Tensor
    entered: Tensor
    written: Tensor
    overwrites: Tensor

    # set by subclasses: input cells (H, W) of a frame
    grid: tuple[int, int]
    # some token of a slot does not exist, so attention has to look at the mass of each
    masked = False
    # held by every call that reads or changes the state
    _lock: MemoryLock

    def hold(self, state: DualState) -> None:
        for name, buffer in state._asdict().items():
            self.register_buffer(name, buffer, persistent=False)

    @property
    def state(self) -> DualState:
        """The state tensors themselves, not copies."""
        return DualState(*(getattr(self, name) for name in DualState._fields))

    @property
    def nbytes(self) -> int:
        """Bytes of state held on the device, weights apart: constant from construction to the end."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    @property
    def archive(self) -> None:
        """None: what leaves are tokens made of many frames, for which there is no archive; it cannot be set."""
        return None

    @archive.setter
    def archive(self, archive: Any) -> None:
        if archive is not None:
            raise ValueError(f"archive: expected None, a dual memory has none, got {type(archive).__name__}")

    @locked
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualStateHolder:
        kept = {name: getattr(self, name) for name in KEPT}
        super()._apply(fn, recurse)
        wide = torch.promote_types(self.working_tokens.dtype, torch.float32)
        for name, old in kept.items():
            # times and masses as they are, means as operators want them beside the tokens
            kind = wide if name.endswith("means") else old.dtype
            if getattr(self, name).dtype != kind:
                setattr(self, name, old.to(getattr(self, name).device, kind))
        return self

    @locked
    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Forget everything, of all streams or of those named; weights stay.

        Raises:
            TypeError, ValueError: No such stream; nothing has changed then.
        """
        if streams is None:
            self.state.clear_()
            self.masked = False
        else:
            self.state.clear_(as_streams(streams, self.entry.shape[0]).to(self.entry.device))

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Pushes within the block leave no trace: the state comes back, in the same tensors, also after an error."""
        with alone(self._lock):
            before = self.snapshot()
            try:
                yield
            finally:
                self._take(before)

    @torch.no_grad()
    @locked
    def erase(self, t0: float, t1: float, stream: int = 0) -> int:
        """Take the span [t0, t1] out of a stream: nothing computed from a frame in it remains, its bytes are zero.

        Every M_t is made from all that came before it, so whatever was written at t0 or later leaves, and frames are
        numbered on from there. While no slot had been overwritten, that is the memory as it was before t0.

        Args:
            t0, t1: Seconds, both included.
            stream: Which stream.

        Returns:
            How many slots were given up.

        Raises:
            ValueError: The span is no span, or something held has no time; nothing has changed then.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        return self.state.until_(stream, t0, included=False)

    @torch.no_grad()
    @locked
    def fork(self: Holder, time: float | None = None) -> Holder:
        """A memory of its own with the same weights that holds the same, or what this one held at second `time`.

        Raises:
            ValueError: A slot that `time` would need has been overwritten since; take a snapshot in time.
        """
        copy = deepcopy(self)
        if time is None:
            return copy
        if math.isnan(time):
            raise ValueError("time: expected seconds, got NaN")
        held = (self.entry >= 0).sum(1)
        for stream in range(self.entry.shape[0]):
            whole = int(held[stream]) == int(self.entered[stream] + self.written[stream])
            if copy.state.until_(stream, time, included=True) and not whole:
                raise ValueError(f"time: expected a second since which nothing was given up, got {time:g} s")
        return copy

    @locked
    def snapshot(self) -> DualState:
        """A copy of the state; `restore` takes it back."""
        return DualState(*(x.clone() for x in self.state))

    @locked
    def restore(self, snapshot: DualState) -> None:
        """Go back to a snapshot of a memory of the same shape and weights; synchronises the host.

        Raises:
            ValueError: The snapshot's shapes or dtypes are not this memory's, or its counters are none that a memory
                has; nothing has changed then.
        """
        self.check(snapshot)
        self._take(snapshot)

    def _take(self, snapshot: DualState) -> None:
        for held, new in zip(self.state, snapshot, strict=True):
            held.copy_(new)
        self.masked = bool(((self.mass == 0) & (self.entry >= 0)[..., None]).any())

    def check(self, snapshot: DualState) -> None:
        """A snapshot is one that this memory can hold.

        Raises:
            ValueError: Its shapes, dtypes, entries or counters are others.
        """
        if not isinstance(snapshot, DualState):
            raise ValueError(f"snapshot: expected DualState, got {type(snapshot).__name__}")
        for name, held, new in zip(DualState._fields, self.state, snapshot, strict=True):
            if held.shape != new.shape or held.dtype != new.dtype:
                raise ValueError(
                    f"snapshot.{name}: expected {shape_of(held)} {held.dtype}, got {shape_of(new)} {new.dtype}"
                )
        if not snapshot.entry.is_meta:
            check_dual_state(snapshot._asdict())
