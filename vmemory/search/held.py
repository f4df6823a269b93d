"""Facts about a memory, a `Bank` or a `DualMemory`, that a video search and its pictures need."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from vmemory.banks import Bank, DualMemory
from vmemory.reference.bank_layout import FIRST, FRAME, LAST, LENGTH, TIME

Memory = Bank | DualMemory


class Tier(NamedTuple):
    """A part of a memory whose entries have one size: its name, its level in `Entries`, its token grid."""

    name: str
    level: int
    grid: tuple[int, int]


def tiers_of(bank: Memory) -> tuple[Tier, ...]:
    """Return the existing tiers, the first tier first."""
    if isinstance(bank, DualMemory):
        grid = (1, 1) if bank.config()["slots"] == "means" else bank.grid
        both = enumerate(zip(("working", "episodic"), bank.capacities, strict=True))
        return tuple(Tier(name, level, grid) for level, (name, slots) in both if slots)
    grids = bank.layout.grids
    names = [f"tier {i + 1}" for i in range(len(grids))] if len(grids) > 1 else ["entries"]
    return tuple(Tier(*tier) for tier in zip(names, bank.levels, grids, strict=True))


def token_device(bank: Memory) -> torch.device:
    """Return the device for tokens."""
    return bank.entry.device


def token_dtype(bank: Memory) -> torch.dtype | None:
    """Return the dtype for tokens; None = any floating dtype."""
    if isinstance(bank, DualMemory):
        return bank.working_tokens.dtype
    return None if bank.quantized else bank.slots.dtype


def shape_of_tokens(bank: Memory) -> tuple[tuple[int, int], int]:
    """Return the token grid (H, W) and the channels of frames."""
    return (bank.grid, bank.dim) if isinstance(bank, DualMemory) else (bank.layout.grid, bank.layout.dim)


def frame_bytes(bank: Memory) -> int:
    """Return the bytes of a whole frame's tokens in the storage dtype, or in 16 bits for int8 and int4."""
    grid, dim = shape_of_tokens(bank)
    dtype = token_dtype(bank)
    return math.prod(grid) * dim * (2 if dtype is None else dtype.itemsize)


def dropped(bank: Memory) -> int:
    """Return the number of frames of which nothing is held."""
    counts = bank.counts()
    if isinstance(bank, DualMemory):
        return counts["seen"] - len(bank.entries().frame.unique())
    return counts["dropped"]


def spans(bank: Memory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first frame, last frame and seconds `[n]` of the entries of one stream, in stream order."""
    entry, clock = bank.entry[0].cpu().numpy(), bank.clock[0].cpu().numpy()
    if isinstance(bank, DualMemory):
        frame = first = last = entry
        time = clock
    else:
        frame, first, last, time = entry[:, FRAME], entry[:, FIRST], entry[:, LAST], clock[:, TIME]
    order = frame.argsort(kind="stable")
    order = order[frame[order] >= 0]
    return first[order], last[order], time[order]


def bytes_in_use(bank: Memory) -> int:
    """Return the bytes that the entries of a memory of one stream occupy."""
    if isinstance(bank, DualMemory):
        live = bank.entry[0] >= 0
        L_w = bank.working_tokens.shape[1]
        parts = {"working": int(live[:L_w].sum()), "episodic": int(live[L_w:].sum())}
        state = bank.state._asdict()
        slots = sum(
            n * state[f"{part}_{name}"][0, :1].nbytes
            for part, n in parts.items()
            for name in ("tokens", "keys", "values", "means", "rest")
        )
        return slots + int(live.sum()) * sum(state[name][0, :1].nbytes for name in ("mass", "entry", "clock"))
    tensors = bank.state
    held = bank.counter[0, LENGTH:].tolist()
    rows = sum(n * cells for n, cells in zip(held, bank.layout.cells, strict=True))
    per_row = sum(t[0, :1].numel() * t.element_size() for t in (tensors.slots, tensors.mass, *tensors[9:]))
    facts = (tensors.descriptor, tensors.norm, tensors.entry, tensors.clock, tensors.order)
    per_entry = sum(t[0, :1].numel() * t.element_size() for t in facts)
    return rows * per_row + sum(held) * per_entry
