"""Trailer localisation: find the time in a film of pictures from its trailer.

Frames of Big Buck Bunny's trailer (with titles, fades and a sepia tone) are searched in memories that watched the whole
film. The published edit list of the trailer gives the true times.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmemory.banks import Memory, MemoryTokens
from vmemory.data import trailer_to_film
from vmemory.eval.features import Features
from vmemory.eval.setups import Setup, keys_of, one_thread, origin_of, setups, watch
from vmemory.search.similar import centred_search

# seconds: the largest error of an answer, and the longest merged span that counts as an answer
TOLERANCE = 2.0
LONGEST_SPAN = 20.0
# seconds around a cut of the trailer without questions: its fades are black
FADE = 0.25
ENTRIES = (64, 128, 256)
BUDGETS = ("4MiB", "8MiB", "16MiB", "32MiB")
DTYPES = ("float16", "int8", "int4")
# entries of the untrained dual memory; it takes as long as all others together
DUAL_ENTRIES = 128


class Queries(NamedTuple):
    """Pictures with known times.

    Pooled tokens `[Q, D]` float32, true seconds `[Q]`, the largest error of an answer and the longest span that counts
    as one, in seconds.
    """

    pooled: Tensor
    truth: Tensor
    tolerance: float = TOLERANCE
    longest: float = LONGEST_SPAN


class Score(NamedTuple):
    """Results of a memory in the localisation of moments.

    Attributes:
        setup: The memory.
        asked: Number of queries.
        hits: Answers whose time is within the tolerance of the truth, or whose span contains the truth; an entry whose
            span is too long is a miss.
        exact: Answers with |truth − entry time| + length of its span <= the tolerance, so a long span has no advantage.
        error: Median of |truth − entry time| over all queries, seconds.
        detail: Remaining detail: mean cosine, over queries and cells, of the answer's tokens (each repeated for its
            cells) with those of the true frame, both about the calibration's origin.
        nbytes: Bytes of the memory.
        held: Entries held at the end.
        push: Median time of pushing one frame on one thread, microseconds.
        missed: Numbers of the queries without a hit.
    """

    setup: Setup
    asked: int
    hits: int
    exact: int
    error: float
    detail: float
    nbytes: int
    held: int
    push: float
    missed: tuple[int, ...]


def trailer_queries(trailer: Features) -> Queries:
    """Return the trailer's frames with a time in the edit list, at least a quarter of a second away from cuts."""
    times = trailer.time.tolist()
    known = [i for i, t in enumerate(times) if _steady(t)]
    truth = [trailer_to_film(times[i]) for i in known]
    return Queries(trailer.pooled()[known], torch.tensor(truth, dtype=torch.float64))


def _steady(t: float) -> bool:
    """Return whether the trailer shows one shot of the film within `FADE` seconds of its second t."""
    begin, at, end = (trailer_to_film(t + shift) for shift in (-FADE, 0.0, FADE))
    return begin is not None and at is not None and end is not None and abs(end - begin - 2 * FADE) < 1e-6


def evaluate(bank: Memory, setup: Setup, features: Features, queries: Queries) -> Score:
    """Push a video frame by frame into a new memory, then search every query.

    A query and the entries' mean tokens are compared by cosine, both about the mean of the entries. `setup` tells
    whether to calibrate; its other fields describe `bank`.
    """
    origin = origin_of(features)
    seconds = watch(bank, features, origin if setup.calibrated else None)
    memory, entries = bank.read(), bank.entries()
    wanted = queries.pooled - origin if setup.calibrated else queries.pooled
    best = centred_search(wanted, keys_of(bank, memory), 1).entry[:, 0]
    time, start, stop = entries.time[best], entries.start[best], entries.stop[best]
    error, span = (queries.truth - time).abs(), stop - start
    hit = (error <= queries.tolerance) | ((start <= queries.truth) & (queries.truth <= stop))
    hit &= span <= queries.longest
    with one_thread():
        detail = [
            _likeness(
                memory, int(entries.frame[i]), int(entries.level[i]), features, float(t), origin, setup.calibrated
            )
            for i, t in zip(best.tolist(), queries.truth.tolist(), strict=True)
        ]
    return Score(
        setup=setup,
        asked=len(queries.truth),
        hits=int(hit.sum()),
        exact=int((error + span <= queries.tolerance).sum()),
        error=float(error.median()),
        detail=sum(detail) / len(detail),
        nbytes=bank.nbytes,
        held=len(entries.time),
        push=1e6 * median(seconds),
        missed=tuple(torch.nonzero(~hit).flatten().tolist()),
    )


def _likeness(
    memory: MemoryTokens, frame: int, level: int, features: Features, truth: float, origin: Tensor, calibrated: bool
) -> float:
    """Return the mean cosine of an entry's tokens with those of the frame at `truth` seconds, cell by cell."""
    side = features.tokens.shape[1]
    tokens = memory.tokens[(memory.frame == frame) & (memory.level == level)].float()
    kept = int(len(tokens) ** 0.5)
    cell = torch.arange(side) * kept // side
    tokens = tokens.view(kept, kept, -1)[cell][:, cell]
    true = features.tokens[int((features.time - truth).abs().argmin())] - origin
    return float(F.cosine_similarity(tokens if calibrated else tokens - origin, true, dim=-1).mean())


def by_entries(features: Features, queries: Queries, entries: Sequence[int] = ENTRIES) -> list[list[Score]]:
    """Score a memory of every frame, then every policy for each number of entries.

    Entries are whole frames; policies that compare frames are scored with and without calibration.
    """
    side, dim = features.tokens.shape[2:]
    everything = Setup("recent", keep=side).bank(side, dim, entries=len(features.time))
    rows = [[evaluate(everything, Setup("unbounded", calibrated=False), features, queries)]]
    del everything
    return rows + [
        [evaluate(setup.bank(side, dim, entries=n), setup, features, queries) for setup in _whole_frames(side)]
        for n in entries
    ]


def _whole_frames(side: int) -> list[Setup]:
    blind = ("uniform", "reservoir", "recent")
    found = [setup for setup in setups(side) if setup.keep in (None, side)]
    return [
        setup._replace(calibrated=calibrated)
        for setup in found
        for calibrated in ((False,) if setup.policy in blind else (False, True))
    ]


def by_bytes(
    features: Features,
    queries: Queries,
    budgets: Sequence[str | int] = BUDGETS,
    dtypes: Sequence[str] = DTYPES,
) -> list[list[Score]]:
    """Score every policy, calibrated, for each number of bytes and each storage dtype."""
    side, dim = features.tokens.shape[2:]
    return [
        [
            evaluate(setup.bank(side, dim, budget=budget), setup, features, queries)
            for dtype in dtypes
            for setup in setups(side, dtype)
        ]
        for budget in budgets
    ]


def of_dual(features: Features, queries: Queries, entries: int = DUAL_ENTRIES) -> list[Score]:
    """Score the untrained dual memory with both of its rules, without calibration."""
    side, dim = features.tokens.shape[2:]
    found = [Setup("dual", rule, calibrated=False, dtype="float32") for rule in ("most-similar", "bridged")]
    return [evaluate(setup.bank(side, dim, entries=entries), setup, features, queries) for setup in found]
