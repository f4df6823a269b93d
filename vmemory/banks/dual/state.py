"""State of the dual memory: slots with their projected keys and values, their entries, and counters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.banks.layout import largest_entries
from vmemory.banks.state import check_counters, check_entries, check_masses


class DualState(NamedTuple):
    """State tensors of S streams, L_w working and L_e episodic slots of n tokens; a snapshot is one of these.

    working_tokens, working_keys, working_values `[S, L_w, n, D]`, working_means `[S, L_w, D]` float32 or better and
    working_extra `[S, L_w, n, E]`, channels beyond `key_dim`; episodic_* the same with L_e; mass
    `[S, L_w + L_e, n]` float32 input cells a token stands for, 0 = the token does not exist; entry `[S, L_w + L_e]`
    int64 frame of each slot, −1 = free; clock `[S, L_w + L_e]` float64 seconds; seen, entered, written `[S]` int64
    frames that came, that entered the working and that entered the episodic memory; overwrites `[S, L_e]` int64.
    """

    working_tokens: Tensor
    working_keys: Tensor
    working_values: Tensor
    working_means: Tensor
    working_extra: Tensor
    episodic_tokens: Tensor
    episodic_keys: Tensor
    episodic_values: Tensor
    episodic_means: Tensor
    episodic_extra: Tensor
    mass: Tensor
    entry: Tensor
    clock: Tensor
    seen: Tensor
    entered: Tensor
    written: Tensor
    overwrites: Tensor

    def clear_(self, which: slice | Tensor = slice(None)) -> None:
        """Remove everything from the streams `which`."""
        for name, x in self._asdict().items():
            x[which] = -1 if name == "entry" else torch.nan if name == "clock" else 0

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self)

    def until_(self, stream: int, time: float, *, included: bool) -> int:
        """Remove every slot of a stream written after second `time`, and pack the others; returns how many left.

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
            for name in ("tokens", "keys", "values", "means", "extra"):
                getattr(self, f"{side}_{name}")[stream, : len(kept)] = getattr(old, f"{side}_{name}")[kept]
            for name in ("mass", "entry", "clock"):
                getattr(self, name)[stream, first : first + len(kept)] = getattr(old, name)[first + kept]
            (self.entered if side == "working" else self.written)[stream] = len(kept)
            if side == "episodic":
                self.overwrites[stream, : len(kept)] = old.overwrites[kept]
        self.seen[stream] = entry[gone].min()
        return int(gone.sum())


# never narrower than float32 when a model around them is cast
KEPT = ("working_means", "episodic_means", "mass", "clock")


def split(entries: int) -> tuple[int, int]:
    """Return the slots of the working and the episodic memory out of so many: one to four, the paper's best."""
    working = max(entries // 5, min(entries, 1))
    return working, entries - working


def new_state(
    streams: int,
    capacity: tuple[int, int],
    tokens: int,
    dim: int,
    device: torch.device | str,
    dtype: torch.dtype,
    extra: int = 0,
) -> DualState:
    """Make an empty memory; `extra` = channels beyond the `dim` that attention reads."""
    L_w, L_e = capacity
    wide = torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(streams, *shape, dtype=kind, device=device)

    def slots(L: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        held, keys, values = (zeros(L, tokens, dim, kind=dtype) for _ in range(3))
        return held, keys, values, zeros(L, dim, kind=wide), zeros(L, tokens, extra, kind=dtype)

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


def capacity_within(
    budget: str | int, streams: int, tokens: int, dim: int, dtype: torch.dtype, extra: int = 0
) -> tuple[int, int]:
    """Return the most slots, one in five working, of which a memory holds no more bytes than its budget.

    Raises:
        ValueError: No slot fits.
    """

    def nbytes(entries: int) -> int:
        # tensors on the meta device have sizes and no memory; three int64 facts stand beside each token
        state = new_state(streams, split(entries), tokens, dim, "meta", dtype, extra)
        return state.nbytes + 3 * 8 * entries * tokens

    return split(largest_entries(budget, 1, nbytes))


def check_dual_state(state: dict[str, Tensor]) -> None:
    """Check that counters, entries, times and masses of a `DualState` as a dict fit each other; synchronises the host.

    Raises:
        ValueError: A value that no memory can have; the message names it.
    """
    seen, entered, written, overwrites, entry, clock, mass = (
        state[name].detach().cpu() for name in ("seen", "entered", "written", "overwrites", "entry", "clock", "mass")
    )
    for name, counter in (("seen", seen), ("entered", entered), ("written", written), ("overwrites", overwrites)):
        check_counters(name, counter)
    if bool(((entered > seen) | (written > seen)).any()):
        raise ValueError("state.entered: expected no more frames than were seen, got more")
    L_w, L_e = state["working_tokens"].shape[1], state["episodic_tokens"].shape[1]
    # slots are taken one after the other
    live = torch.cat([torch.arange(L_w) < entered[:, None], torch.arange(L_e) < written[:, None]], 1)
    check_entries(entry[..., None].expand(*entry.shape, 3), live, seen)
    if bool(clock[live].isinf().any()):
        raise ValueError("state.clock: expected finite seconds, or NaN, got infinite ones")
    check_masses(mass, live[..., None].expand_as(mass))
