"""Update memories of fixed slots: first in, first out, or replacement of the most similar slot."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-8


def _rows(slots: Tensor, frames: Tensor, streams: Tensor | None) -> list[tuple[int, int]]:
    """Return pairs (row of frames, stream of slots) for the rows whose stream exists."""
    targets = range(frames.shape[0]) if streams is None else streams.tolist()
    return [(row, stream) for row, stream in enumerate(targets) if 0 <= stream < slots.shape[0]]


def ring_push_(slots: Tensor, count: Tensor, frames: Tensor, streams: Tensor | None = None) -> None:
    """Write frames `[S', T, N, D]` in order, each to slot `count % M`, and increment `count`."""
    M, T = slots.shape[1], frames.shape[1]
    for row, stream in _rows(slots, frames, streams):
        first = int(count[stream])
        for t in range(max(0, T - M), T):
            slots[stream, (first + t) % M] = frames[row, t]
        count[stream] += T


def ring_read(slots: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots in the order of writing, oldest first, then zeros; and the number of written slots."""
    S, M = slots.shape[:2]
    held = count.clamp(0, M)
    k = torch.arange(M, device=slots.device)
    index = (count - held)[:, None] + k
    ordered = slots[torch.arange(S, device=slots.device)[:, None], index % max(M, 1)]
    return torch.where((k < held[:, None])[..., None, None], ordered, 0), held


def similarity(slots: Tensor, frame: Tensor, level: str) -> Tensor:
    """Return cosines of `frame [N, D]` with `slots [M, N, D]`, over all values (`"flat"`) or over the means."""
    wide = torch.promote_types(slots.dtype, torch.float32)
    a, b = slots.to(wide), frame.to(wide)
    a, b = (a.flatten(1), b.flatten()) if level == "flat" else (a.mean(1), b.mean(0))
    # not a matrix product, because its order of summation depends on the row: equal slots must have equal scores
    return (a * b).sum(-1) / (a.norm(dim=-1).clamp_min(_EPS) * b.norm().clamp_min(_EPS))


def slot_replace_(
    slots: Tensor,
    count: Tensor,
    frames: Tensor,
    streams: Tensor | None = None,
    level: str = "flat",
    means: Tensor | None = None,
) -> Tensor:
    """Write each of `frames [S', N, D]` to the next free slot or the most similar one; return replaced slots `[S']`.

    −1 if none was replaced. Of equal similarities the first is taken; NaN is the largest of all.
    """
    M = slots.shape[1]
    replaced = count.new_full((frames.shape[0],), -1)
    for row, stream in _rows(slots, frames, streams):
        slot = int(count[stream])
        count[stream] += 1
        if M == 0:
            continue
        if slot >= M:
            scores = similarity(slots[stream], frames[row], level)
            slot = int(scores.sort(descending=True, stable=True).indices[0])
            replaced[row] = slot
        slots[stream, slot] = frames[row]
        if means is not None:
            means[stream, slot] = frames[row].to(means.dtype).mean(0)
    return replaced
