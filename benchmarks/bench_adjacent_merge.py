"""Time the merge of the most similar neighbours of a memory bank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import merging as peer
from vmemory.ops import adjacent_merge


def _case(name: str, level: str, entries: int, dtype: torch.dtype = torch.float32, backward: bool = False) -> Case:
    def size(x: Tensor) -> Tensor:
        return x.new_ones(x.shape[:3], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    def run(x: Tensor) -> Tensor:
        return adjacent_merge(x, size(x), level).bank

    def plain(x: Tensor) -> Tensor:
        return peer.compress(x, size(x), level)[0]

    written = (entries - 1) / entries
    # backward reads the gradient of the output and writes that of the bank
    return Case(
        name, lambda _: (1, entries, 196, 896), run, plain, written + (written + 1 if backward else 0), 4.0,
        dtype=dtype, backward=backward,
    )  # fmt: skip


ADJACENT_MERGE = [
    _case("frame, 21 of 196×896", "frame", 21),
    _case("token, 21 of 196×896", "token", 21),
    _case("token, 21 of 196×896 bf16", "token", 21, torch.bfloat16),
    _case("frame, 512 of 196×896", "frame", 512),
    _case("token, 512 of 196×896", "token", 512),
    _case("token, 21 of 196×896, forward + backward", "token", 21, backward=True),
]


@pytest.mark.parametrize("case", ADJACENT_MERGE, ids=lambda case: case.name)
@pytest.mark.benchmark(group="adjacent_merge")
def test_adjacent_merge(case, race):
    race(case)
