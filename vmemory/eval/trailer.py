"""Trailer localisation: pictures from a trailer, and the question when in the film they are.

Frames of Big Buck Bunny's trailer (titles, fades and a sepia tone on top) are looked up in memories that watched the
whole film; the published edit list of the trailer knows every answer.
"""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.banks import Bank, MemoryTokens
from vmemory.data import trailer_to_film
from vmemory.eval.features import Features
from vmemory.stream.search import centred_search
from vmemory.stream.video_bank import video_bank

# seconds: how far off an answer may be, and the longest merged span that counts as an answer at all
TOLERANCE = 2.0
LONGEST_SPAN = 20.0
# seconds around a cut of the trailer without questions: its fades are black
FADE = 0.25
# seconds of the film whose mean token calibrated memories subtract
CALIBRATION = 60.0
# policy, and whether tokens are calibrated; the last three do not look at features
BOUNDED = (
    ("hierarchical", False),
    ("hierarchical", True),
    ("merging", False),
    ("merging", True),
    ("episodic", False),
    ("episodic", True),
    ("uniform", False),
    ("reservoir", False),
    ("recent", False),
)
ENTRIES = (64, 128, 256)
FEW_BITS = ("int8", "int4")
BUDGETS = ("4MiB", "8MiB", "16MiB", "32MiB")


class Queries(NamedTuple):
    """Pictures with a known place: pooled tokens `[Q, D]` float32, true seconds in the film `[Q]`."""

    pooled: Tensor
    truth: Tensor


class Score(NamedTuple):
    """How well a memory finds moments again.

    Attributes:
        policy: The memory's policy, or `"unbounded"`.
        calibrated: Tokens entered minus the mean token of the film's first minute.
        dtype: What tokens are stored in.
        asked: Number of queries.
        hits: Answers whose own time is within `TOLERANCE` of the truth, or whose span contains it; an entry whose span
            is longer than `LONGEST_SPAN` is a miss.
        exact: Answers with |truth − entry time| + length of its span <= `TOLERANCE`: a long span gains nothing.
        error: Median of |truth − entry time| over all queries, seconds.
        nbytes: Bytes the memory holds.
        held: Entries held after the film.
        push: Median time of pushing one frame on one thread, microseconds.
    """

    policy: str
    calibrated: bool
    dtype: str
    asked: int
    hits: int
    exact: int
    error: float
    nbytes: int
    held: int
    push: float


def trailer_queries(trailer: Features) -> Queries:
    """The trailer's frames that the edit list places in the film, a quarter of a second or more away from cuts."""
    times = trailer.time.tolist()
    known = [i for i, t in enumerate(times) if _steady(t)]
    truth = [trailer_to_film(times[i]) for i in known]
    return Queries(trailer.pooled()[known], torch.tensor(truth, dtype=torch.float64))


def _steady(t: float) -> bool:
    """Whether the trailer shows one shot of the film from `FADE` seconds before its second t to `FADE` after."""
    begin, at, end = (trailer_to_film(t + shift) for shift in (-FADE, 0.0, FADE))
    return begin is not None and at is not None and end is not None and abs(end - begin - 2 * FADE) < 1e-6


def evaluate(
    bank: Bank, features: Features, queries: Queries, *, calibrated: bool = False, policy: str | None = None
) -> Score:
    """Let a fresh memory watch a film frame by frame, then look every query up.

    A query and the entries' mean tokens are compared by cosine, both about the mean of the entries. A bank in 8 or 4
    bits is searched by the means of the tokens it gives back, so that what rounding costs is seen.
    """
    wanted = queries.pooled
    origin = features.pooled()[features.time < CALIBRATION].mean(0) if calibrated else None
    if origin is not None:
        wanted = wanted - origin
    seconds = _watch(bank, features, origin)
    entries = bank.entries()
    means = _means(bank.read(), entries.frame) if bank.quantized else entries.descriptor
    best = centred_search(wanted, means, 1).entry[:, 0]
    time, start, stop = entries.time[best], entries.start[best], entries.stop[best]
    error, span = (queries.truth - time).abs(), stop - start
    near = (error <= TOLERANCE) | ((start <= queries.truth) & (queries.truth <= stop))
    return Score(
        policy=policy or bank.policy,
        calibrated=calibrated,
        dtype=bank.config()["dtype"],
        asked=len(queries.truth),
        hits=int((near & (span <= LONGEST_SPAN)).sum()),
        exact=int((error + span <= TOLERANCE).sum()),
        error=float(error.median()),
        nbytes=bank.nbytes,
        held=len(entries.time),
        push=1e6 * median(seconds),
    )


def _means(memory: MemoryTokens, frames: Tensor) -> Tensor:
    """Mean token `[n, D]` of each entry, from its tokens."""
    entry = torch.searchsorted(frames.contiguous(), memory.frame)
    sums = memory.tokens.new_zeros((len(frames), memory.tokens.shape[1])).index_add(0, entry, memory.tokens)
    return sums / torch.bincount(entry, minlength=len(frames))[:, None]


def _watch(bank: Bank, features: Features, origin: Tensor | None) -> list[float]:
    """Push every frame by itself; the seconds each took."""
    threads, seconds = torch.get_num_threads(), []
    # one frame is too little to share out, and on a busy machine the threads would measure each other
    torch.set_num_threads(1)
    try:
        for i in range(len(features.time)):
            frame, at = features.tokens[i : i + 1], features.time[i : i + 1]
            if origin is not None:
                frame = (frame - origin).to(frame.dtype)
            started = clock.perf_counter()
            bank.push(frame, at)
            seconds.append(clock.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds


def by_entries(features: Features, queries: Queries, entries: Sequence[int] = ENTRIES) -> list[list[Score]]:
    """A memory that keeps every frame; then, for each number of entries, a list of every policy."""
    side, dim = features.tokens.shape[2:]
    everything = video_bank("recent", side, dim, entries=len(features.time))
    rows = [[evaluate(everything, features, queries, policy="unbounded")]]
    del everything
    return rows + [_all(features, queries, entries=n) for n in entries]


def by_bytes(features: Features, queries: Queries, budgets: Sequence[str | int] = BUDGETS) -> list[list[Score]]:
    """For each number of bytes a list of every policy."""
    return [_all(features, queries, budget=budget) for budget in budgets]


def by_storage(
    features: Features, queries: Queries, entries: Sequence[int] = ENTRIES, dtypes: Sequence[str] = FEW_BITS
) -> list[list[Score]]:
    """For each number of entries and each way to store tokens in few bits a list of every policy."""
    return [_all(features, queries, entries=n, dtype=dtype) for n in entries for dtype in dtypes]


def _all(
    features: Features,
    queries: Queries,
    *,
    entries: int | None = None,
    budget: str | int | None = None,
    dtype: torch.dtype | str = torch.float16,
) -> list[Score]:
    side, dim = features.tokens.shape[2:]
    return [
        evaluate(
            video_bank(policy, side, dim, entries=entries, budget=budget, dtype=dtype),
            features,
            queries,
            calibrated=calibrated,
        )
        for policy, calibrated in BOUNDED
    ]
