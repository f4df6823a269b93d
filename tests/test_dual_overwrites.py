"""Which episodic slots are overwritten, and how evenly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.test_dual_state import DIM, GRID, memory_of
from vmemory import banks
from vmemory.banks.dual.rules import bridged_slot
from vmemory.eval import compare_overwrites


def scenes(T: int, seed: int, grid: tuple[int, int] = GRID, dim: int = DIM) -> Tensor:
    """Shots of 5 to 24 frames, each a picture of its own under noise."""
    generator, frames = torch.Generator().manual_seed(seed), []
    while len(frames) < T:
        picture = torch.randn(*grid, dim, generator=generator)
        length = int(torch.randint(5, 25, (), generator=generator))
        frames += [picture + 0.3 * torch.randn(*grid, dim, generator=generator) for _ in range(length)]
    return torch.stack(frames[:T])


@pytest.mark.parametrize(
    ("overwrites", "bits"),
    [([[4, 4, 4, 4], [9, 0, 0, 0]], [2.0, 0.0]), ([[2, 1, 1, 0]], [1.5]), ([[0, 0]], [math.nan]), ([[5]], [0.0])],
)
def test_entropy_of_overwrites_in_bits(overwrites: list[list[int]], bits: list[float]) -> None:
    found = banks.overwrite_entropy(torch.tensor(overwrites))
    torch.testing.assert_close(found, torch.tensor(bits, dtype=torch.float64), equal_nan=True)


def test_entropy_of_nothing_is_unknown_and_bad_counts_are_named() -> None:
    assert banks.overwrite_entropy(torch.zeros(3, 0)).isnan().tolist() == [True] * 3
    with pytest.raises(TypeError, match=r"overwrites: expected a tensor \[..., M\], got list"):
        banks.overwrite_entropy([1, 2])
    with pytest.raises(ValueError, match=r"overwrites: expected a tensor \[..., M\], got shape \[\]"):
        banks.overwrite_entropy(torch.tensor(3))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_papers_rule_freezes_slots_and_bridging_does_not(seed: int) -> None:
    frames = scenes(200, seed)
    found = compare_overwrites(frames, capacity=(4, 8), heads=4, seed=seed)
    frozen, cured = found["most-similar"], found["bridged"]
    assert frozen.times == cured.times == 192
    # out of three bits; most overwrites fall on one slot, and half of the memory are first frames to the end
    assert frozen.bits < 1 < 2 < cured.bits <= 3
    assert frozen.untouched >= 4
    assert cured.untouched <= 2
    assert sorted(frozen.held)[3] < 8 <= sorted(cured.held)[3]


@pytest.mark.parametrize("residual", [False, True])
def test_comparing_rules_leaves_no_trace_and_takes_weights(residual: bool) -> None:
    frames = scenes(40, 0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found = compare_overwrites(frames, capacity=(2, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(found) == ["most-similar", "bridged"]
    assert compare_overwrites(frames, capacity=(2, 4)) == found
    memory = memory_of((2, 4), heads=8, rule="bridged", residual=residual)
    memory.push(frames)
    theirs = compare_overwrites(frames, capacity=(2, 4), rules=["bridged"], weights=memory.state_dict())["bridged"]
    assert theirs.bits == float(memory.overwrite_entropy()[0])
    assert theirs.held == memory.entries().frame[memory.entries().level == 1].tolist()
    assert math.isnan(compare_overwrites(frames[:3], capacity=(2, 4))["bridged"].bits)
    with pytest.raises(ValueError, match=r"frames: expected \[T, H, W, D\], got shape \[2, 3, 16\]"):
        compare_overwrites(frames[0])


def test_bridging_gives_up_the_slot_between_alike_neighbours() -> None:
    a, b, c = torch.eye(3)
    # by time: a, b, a, c; the slots lie in another order
    means, entry = torch.stack([a, c, a, b])[None], torch.tensor([[0, 9, 7, 4]])
    assert bridged_slot(means, entry, b[None]).tolist() == [3]
    # the newest goes while the new frame is like the one before it; the first never does
    assert bridged_slot(torch.stack([a, b, c])[None], torch.tensor([[0, 1, 2]]), b[None]).tolist() == [2]
    assert bridged_slot(torch.stack([a, c])[None], torch.tensor([[3, 2]]), a[None]).tolist() == [0]
    assert bridged_slot(a[None, None], torch.tensor([[5]]), b[None]).tolist() == [0]
    broken = torch.stack([a, b, torch.full((3,), torch.nan), a])[None]
    assert bridged_slot(broken, torch.tensor([[0, 1, 2, 3]]), b[None]).tolist() == [2]
