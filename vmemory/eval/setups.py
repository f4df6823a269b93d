"""Memories to compare, and the vectors that searches use."""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.banks import Memory, MemoryTokens
from vmemory.eval.features import Features
from vmemory.search.presets import video_bank

# seconds of a video whose mean token calibrated memories subtract
CALIBRATION = 60.0


class Setup(NamedTuple):
    """A memory in a comparison.

    policy: a key of `vmemory.banks.POLICIES`, or `"unbounded"`; rule: as in `video_bank`; keep: tokens per side of its
    entries, None = several sizes; calibrated: the mean token of the video's first minute is subtracted from all tokens;
    dtype: storage dtype of tokens.
    """

    policy: str
    rule: str | None = None
    keep: int | None = None
    calibrated: bool = True
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """The memory's name among calibrated ones, without the dtype."""
        parts = [self.policy, self.rule if self.rule != "paper" else None]
        parts += [None if self.keep is None else f"{self.keep}×{self.keep}"]
        return ", ".join(part for part in parts if part)

    def bank(self, side: int, dim: int, *, entries: int | None = None, budget: str | int | None = None) -> Memory:
        """Return the empty memory for tokens `[side, side, dim]`."""
        dtype = getattr(torch, self.dtype) if self.dtype.startswith("float") else self.dtype
        return video_bank(
            self.policy, side, dim, rule=self.rule, entries=entries, budget=budget, dtype=dtype, keep=self.keep
        )


def single_size(side: int) -> tuple[int, ...]:
    """Return the compared tokens per side for entries of one size: a third of the frame's, and all."""
    return (side // 3, side) if side % 3 == 0 else (side,)


def setups(side: int, dtype: str = "float16", *, rules: bool = True) -> list[Setup]:
    """Return every policy except the dual memory, calibrated, at every size of entries.

    Args:
        side: Tokens per side of the frames.
        dtype: Storage dtype of tokens; int8 and int4 exclude the rules whose pooling changes a frame's mean.
        rules: Include all rules of the hierarchical memory, otherwise the paper's only.
    """
    others = ("videochat-online", "all-pairs") if rules and dtype.startswith("float") else ()
    found = [Setup("hierarchical", rule, dtype=dtype) for rule in ("paper", *others)]
    for policy in ("merging", "episodic", "uniform", "reservoir", "recent"):
        found += [Setup(policy, keep=keep, dtype=dtype) for keep in single_size(side)]
    return found


def origin_of(features: Features) -> Tensor:
    """Return the mean token `[D]` of the first minute."""
    return features.pooled()[features.time < CALIBRATION].mean(0)


def watch(bank: Memory, features: Features, origin: Tensor | None) -> list[float]:
    """Push frames one by one, minus `origin`; return the seconds of each push."""
    kind = bank.token_dtype or features.tokens.dtype
    seconds = []
    with one_thread():
        for i in range(len(features.time)):
            frame, at = features.tokens[i : i + 1], features.time[i : i + 1]
            frame = (frame if origin is None else frame - origin).to(kind)
            started = clock.perf_counter()
            bank.push(frame, at)
            seconds.append(clock.perf_counter() - started)
    return seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: a frame is too little work for several, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keys_of(bank: Memory, memory: MemoryTokens) -> Tensor:
    """Return the search keys `[n, D]` float32: the mean token of each entry.

    For a bank in 8 or 4 bits it is the mean of the dequantised tokens, to include the rounding error.
    """
    entries = bank.entries()
    return means(memory, entries.frame) if bank.token_dtype is None else entries.descriptor


def means(memory: MemoryTokens, frames: Tensor) -> Tensor:
    """Return the mean token `[n, D]` of each entry, computed from its tokens."""
    entry = torch.searchsorted(frames.contiguous(), memory.frame)
    sums = memory.tokens.new_zeros((len(frames), memory.tokens.shape[1])).index_add(0, entry, memory.tokens)
    return sums / torch.bincount(entry, minlength=len(frames))[:, None]
