"""Remove the time text of frames without tokens, in prompts with the time as text before each frame."""

from __future__ import annotations

import torch
from torch import Tensor

Span = tuple[int, int]


def runs_of(places: Tensor) -> list[Span]:
    """Return the consecutive runs of sorted positions `[n]`, as half-open spans."""
    if not len(places):
        return []
    cut = (places[1:] != places[:-1] + 1).nonzero().flatten() + 1
    edges = [0, *cut.tolist(), len(places)]
    first, last = places[edges[:-1]].tolist(), places[[edge - 1 for edge in edges[1:]]].tolist()
    return [(start, stop + 1) for start, stop in zip(first, last, strict=True)]


def dead_spans(row: Tensor, keep: Tensor, places: Tensor, frames: int) -> list[Span]:
    """Return the spans of a row `[L]` with frames that have no kept token, including their own text.

    Text is found by its position between two runs of placeholders, never by its words, because tokenizers join it with
    neighbouring text. The first frame's own text starts at the last occurrence of the first gap's first or second token
    at the distance of this gap; without an occurrence the text stays.

    Args:
        row: `[L]` ids of one prompt.
        keep: `[L]` bool, False for placeholders that are removed.
        places: Positions of the video's placeholders, sorted.
        frames: Frames of the video; prompts with another number of runs have no times, and nothing is removed.
    """
    runs = runs_of(places)
    if len(runs) != frames or frames < 2:
        return []
    total = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    first, last = torch.tensor(runs, device=keep.device).T
    live: list[bool] = (total[last] > total[first]).tolist()
    spans = [(runs[f - 1][1], runs[f][1]) for f in range(1, frames) if not live[f]]
    if live[0]:
        return spans
    gap = row[runs[0][1] : runs[1][0]].tolist()
    start = _own_text(row[: runs[0][0]].tolist(), gap)
    if start is not None and any(live):
        begin, separator = start
        spans.append((begin, runs[0][1]))
        # the first remaining frame needs no separator before it
        end = runs[live.index(True) - 1][1]
        spans.append((end, end + separator))
    return spans


def _own_text(before: list[int], gap: list[int]) -> tuple[int, int] | None:
    """Return the start of the first frame's text, and the number of tokens of a gap that are separators."""
    best: tuple[int, int, int] | None = None
    for separator, first in enumerate(gap[:2]):
        if first not in before:
            continue
        at = len(before) - 1 - before[::-1].index(first)
        off = abs((len(before) - at) - (len(gap) - separator))
        if off <= 3 and (best is None or off < best[0]):
            best = (off, at, separator)
    return None if best is None else best[1:]


def close_gaps(positions: Tensor, row: int, spans: list[Span]) -> None:
    """Close the gaps that removed spans of a row leave in `positions [3, B, L]`, in place.

    The text states the time, so removed frames must leave no gap. Spans start and end at text, where all three rows
    are equal.
    """
    length = positions.shape[-1]
    inner = [(start, stop) for start, stop in spans if stop < length]
    if not inner:
        return
    start, stop = torch.tensor(inner, device=positions.device).T
    time = positions[0, row]
    shift = torch.zeros_like(time).index_add(0, stop, time[stop] - time[start])
    positions[:, row] -= shift.cumsum(0)
