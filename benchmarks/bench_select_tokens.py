"""Time the selection of the best tokens, and gathering them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import select_and_gather as peer
from vmemory.ops import compact, select_tokens
from vmemory.testing import random_tensor

KEPT = 0.3


def _selection(name: str, streams: int, tokens: int, frames: int = 1, **options: object) -> Case:
    budget = int(KEPT * tokens) // frames

    def run(x: Tensor) -> Tensor:
        if frames == 1:
            return select_tokens(x, budget)
        segments = torch.arange(frames, device=x.device).repeat_interleave(tokens // frames)
        return select_tokens(x, [budget] * frames, segments).indices

    def plain(x: Tensor) -> Tensor:
        return peer.select(x, budget) if frames == 1 else peer.by_frame(x, frames, budget)

    return Case(name, lambda _: (streams, tokens), run, plain, 8 * budget * frames / tokens / 4, 1.0, **options)


def _compaction(name: str, kept: float, dtype: torch.dtype = torch.float32, backward: bool = False) -> Case:
    tokens, channels = 1 << 17, 1024

    def keep(x: Tensor) -> Tensor:
        scores = random_tensor(1, tokens, device=x.device, seed=7)
        return select_tokens(scores, int(kept * tokens))

    chosen: dict[torch.device, Tensor] = {}

    def rows(x: Tensor) -> Tensor:
        return chosen.setdefault(x.device, keep(x)) if x.device not in chosen else chosen[x.device]

    # kept tokens are read and written; backward reads their gradient and writes one for every token
    moved = 2 * kept - 1 + (kept + 1 if backward else 0)
    return Case(
        name, lambda _: (1, tokens, channels), lambda x: compact(x, rows(x)).tokens, lambda x: peer.gather(x, rows(x)),
        moved, 0.0, dtype=dtype, backward=backward,
    )  # fmt: skip


SELECTION = [
    _selection("7,262 of 24,209", 1, 24_209),
    _selection("64 streams, 7,262 of 24,209", 64, 24_209),
    _selection("300,000 of 1,000,000", 1, 1_000_000),
    _selection("58 of each of 124 frames of 196", 1, 124 * 196, 124),
    _selection("58 of one frame of 196", 1, 196),
]
COMPACTION = [
    _compaction("half of 512 MB", 0.5),
    _compaction("half of 256 MB bf16", 0.5, torch.bfloat16),
    _compaction("one in ten of 512 MB", 0.1),
    _compaction("half of 512 MB, forward + backward", 0.5, backward=True),
]


@pytest.mark.parametrize("case", SELECTION, ids=lambda case: case.name)
@pytest.mark.benchmark(group="select_tokens")
def test_select_tokens(case, race):
    race(case)


@pytest.mark.parametrize("case", COMPACTION, ids=lambda case: case.name)
@pytest.mark.benchmark(group="compact")
def test_compact(case, race):
    race(case)
