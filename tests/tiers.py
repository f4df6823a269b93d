"""Videos for a tiered memory, and what it holds after them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.ops.bank import bank_push_
from vmemory.reference.bank import Stream
from vmemory.reference.bank_layout import BankLayout, BankState
from vmemory.testing import random_tensor


class Video(NamedTuple):
    frames: Tensor
    time: Tensor | None = None
    mask: Tensor | None = None

    def part(self, start: int, stop: int) -> dict[str, Tensor | None]:
        return {n: None if x is None else x[:, start:stop] for n, x in zip(("time", "mask"), self[1:], strict=True)}


def video(layout: BankLayout, streams: int, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Frames that drift, so that neighbours are alike."""
    shape = (streams, steps, *layout.grid, layout.dim)
    drift = random_tensor(*shape, dtype=torch.float64, seed=seed).cumsum(1) * 0.3
    return (drift + random_tensor(streams, 1, *shape[2:], dtype=torch.float64, seed=seed + 1)).to(dtype)


def pushed(layout: BankLayout, v: Video, impl: str, chunk: int = 1000, streams: Tensor | None = None) -> BankState:
    state = layout.new_state(v.frames.shape[0], v.frames.device, v.frames.dtype)
    for start in range(0, v.frames.shape[1], chunk):
        parts = v.part(start, start + chunk)
        bank_push_(state, layout, v.frames[:, start : start + chunk], **parts, streams=streams, impl=impl)
    return state


def lists(layout: BankLayout, state: BankState, stream: int = 0) -> list[list[int]]:
    """Frame numbers of each tier in list order."""
    view = Stream(state, stream, layout)
    return [[int(view.state.entry[slot, 0]) for slot in view.listed(tier)] for tier in range(layout.tiers)]
