"""State of the dual memory: slots with their projected keys and values, counters, and which slot is overwritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmemory.ops._checks import shape_of

_EPS = 1e-8


class DualState(NamedTuple):
    """State tensors of S streams, L_w working and L_e episodic slots of n tokens; a snapshot is one of these.

    working_tokens, working_keys, working_values `[S, L_w, n, D]`; episodic_* `[S, L_e, n, D]`; means `[S, L_e, 1, D]`
    of the episodic slots (`[S, 0, 1, D]` unless the rule needs them); entry `[S, L_w + L_e]` int64 frame of each slot,
    −1 = free; clock `[S, L_w + L_e]` float64 seconds; seen, written `[S]` int64 frames ever put into the working and the
    episodic memory; overwrites `[S, L_e]` int64.
    """

    working_tokens: Tensor
    working_keys: Tensor
    working_values: Tensor
    episodic_tokens: Tensor
    episodic_keys: Tensor
    episodic_values: Tensor
    means: Tensor
    entry: Tensor
    clock: Tensor
    seen: Tensor
    written: Tensor
    overwrites: Tensor

    def clear_(self, which: slice | Tensor = slice(None)) -> None:
        for name, x in self._asdict().items():
            x[which] = -1 if name == "entry" else torch.nan if name == "clock" else 0


# keep their dtype when a model around them is cast
KEPT = ("means", "clock")


def new_state(
    streams: int, capacities: tuple[int, int], tokens: int, dim: int, means: bool,
    device: torch.device | str, dtype: torch.dtype,
) -> DualState:  # fmt: skip
    """An empty memory."""
    L_w, L_e = capacities
    wide = torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(streams, *shape, dtype=kind, device=device)

    slots = [zeros(L, tokens, dim, kind=dtype) for L in (L_w, L_w, L_w, L_e, L_e, L_e)]
    state = DualState(
        slots[0], slots[1], slots[2], slots[3], slots[4], slots[5], zeros(L_e if means else 0, 1, dim, kind=wide), zeros(L_w + L_e), zeros(L_w + L_e, kind=torch.float64),
        zeros(), zeros(), zeros(L_e),
    )  # fmt: skip
    state.clear_()
    return state


def bridged_slot(means: Tensor, entry: Tensor, mean: Tensor) -> Tensor:
    """The slot of a full memory that the frames before and after it make most superfluous.

    Slots in the order of their frames, the new frame last: the cosine of a slot's two neighbours says how little is
    lost without it. The first frame stays (unless it is alone), of equals the earlier leaves, non-finite ones at once.
    The new frame's predecessor is given up until the new frame is far enough from the one before that; then it stays.

    Args:
        means: `[S, M, D]` means of the slots, float32 or better, M at least 1.
        entry: `[S, M]` int64 frame of each slot.
        mean: `[S, D]` mean of the new frame.

    Returns:
        `[S]` int64.
    """
    order = entry.argsort(1)
    held = means.gather(1, order[..., None].expand_as(means))
    x = torch.cat([held, mean[:, None]], 1)
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(_EPS)
    bridges = (x[:, :-2] * x[:, 2:]).sum(-1).nan_to_num(nan=-2.0)
    scores = torch.cat([torch.full_like(x[:, :1, 0], -3.0), bridges], 1)
    scores = torch.where(held.isfinite().all(-1), scores, torch.inf)
    place = scores.sort(dim=1, descending=True, stable=True).indices[:, :1]
    return order.gather(1, place)[:, 0]


def overwrite_entropy(overwrites: Tensor) -> Tensor:
    """How evenly the slots of a memory are overwritten: entropy of the counts over the entropy of equal counts.

    0 = always the same slot, the others are frozen; 1 = all slots equally often.

    Args:
        overwrites: `[..., M]` how often each slot was overwritten.

    Returns:
        `[...]` float64; NaN where nothing was overwritten or M is below 2.

    Raises:
        TypeError: No tensor.
        ValueError: No dimension.
    """
    if not isinstance(overwrites, Tensor):
        raise TypeError(f"overwrites: expected a tensor [..., M], got {type(overwrites).__name__}")
    if overwrites.dim() == 0:
        raise ValueError("overwrites: expected a tensor [..., M], got shape []")
    share = overwrites.double() / overwrites.sum(-1, keepdim=True)
    even = torch.tensor(float(overwrites.shape[-1]), dtype=torch.float64).log()
    return -torch.special.xlogy(share, share).sum(-1) / even.to(share.device)


class DualStateHolder(nn.Module):
    """A module that holds a `DualState` in buffers, which are not part of `state_dict`."""

    # the state, registered as buffers
    working_tokens: Tensor
    working_keys: Tensor
    working_values: Tensor
    episodic_tokens: Tensor
    episodic_keys: Tensor
    episodic_values: Tensor
    means: Tensor
    entry: Tensor
    clock: Tensor
    seen: Tensor
    written: Tensor
    overwrites: Tensor

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualStateHolder:
        kept = {name: getattr(self, name) for name in KEPT}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def overwrite_entropy(self) -> Tensor:
        """`[S]` float64: how evenly the episodic slots were overwritten, see `overwrite_entropy`."""
        return overwrite_entropy(self.overwrites)

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Forget everything, of all streams or of those named."""
        which = (
            slice(None) if streams is None else torch.tensor(list(streams), dtype=torch.int64, device=self.entry.device)
        )
        self.state.clear_(which)

    def snapshot(self) -> DualState:
        """A copy of the state; `restore` takes it back."""
        return DualState(*(x.clone() for x in self.state))

    def restore(self, snapshot: DualState) -> None:
        """Go back to a snapshot of a memory of the same shape and weights.

        Raises:
            ValueError: The snapshot's shapes or dtypes are not this memory's; nothing has changed then.
        """
        for name, held, new in zip(DualState._fields, self.state, snapshot, strict=True):
            if held.shape != new.shape or held.dtype != new.dtype:
                raise ValueError(
                    f"snapshot.{name}: expected {shape_of(held)} {held.dtype}, got {shape_of(new)} {new.dtype}"
                )
        for held, new in zip(self.state, snapshot, strict=True):
            held.copy_(new)
