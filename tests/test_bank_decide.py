"""Decisions as an operator: what it says is what a push does, and a caller's choice stands before the rule's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.test_bank_op import CASES
from tests.tiers import video
from vmemory.ops import bank as ops
from vmemory.ops.bank import bank_decide, bank_push_
from vmemory.reference.bank_layout import FRAME, SEEN, BankLayout, BankState
from vmemory.testing import random_tensor


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("native")
    return request.param


# two tiers, one that merges, one that frames enter by interval; their reductions keep a frame's mean
QUANTIZED = {
    "paper": BankLayout((8, 4), 24, 24, (3, 2, 3), ((8, 4), (4, 2), (2, 1))),
    "videochat-online": BankLayout(
        (8, 8), 16, 9, (2, 2, 3), ((8, 8), (4, 4), (2, 2)), "videochat-online", (4, 2, 1), (0, 1, 2)
    ),
    "merge": BankLayout((4, 4), 20, 20, (4,), ((2, 2),), "merge"),
    "recent": BankLayout((4, 3), 17, 17, (3,), ((4, 3),), "recent"),
}


def random_victims(layout: BankLayout, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, max(layout.slots, 1), (*shape, layout.tiers), generator=generator)


def check_step(step: ops.Step, layout: BankLayout, before: BankState, after: BankState) -> None:
    """The step says what the lists of `after` show."""
    for s in range(before.counter.shape[0]):
        seen, old, new = int(before.counter[s, SEEN]), before.entry[s, :, FRAME], after.entry[s, :, FRAME]
        assert int(step.tier[s]) == layout.entry_tier(seen)
        if step.tier[s] >= 0:
            assert new[step.fresh[s]] == seen
        for tier in range(layout.tiers):
            slot, target = int(step.leaves[s, tier]), int(step.target[s, tier])
            assert slot < 0 or layout.tier_of[slot] == tier
            if target >= 0:
                assert layout.tier_of[target] == tier + 1
                assert new[target] == old[slot]
        evicted = int(step.evicted()[s])
        if evicted >= 0:
            assert old[evicted] not in new
        gone = set(old[old >= 0].tolist()) - set(new.tolist())
        assert gone == ({int(old[evicted])} if evicted >= 0 else set())
        assert step.merged[s] < 0 or evicted == step.leaves[s, 0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", [False, True])
def test_push_does_what_was_decided(impl, name, chosen):
    layout = CASES[name]
    frames = video(layout, 2, 14)
    frames[0, 5] = float("nan")
    state = layout.new_state(2, "cpu", frames.dtype)
    victims = random_victims(layout, 2, 14)
    for t in range(14):
        before = BankState(*(x.clone() for x in state))
        victim = victims[:, t] if chosen else None
        step = bank_decide(state, layout, victim=victim, impl=impl)
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(before, state, strict=True))
        want = bank_decide(state, layout, victim=victim, impl="reference")
        assert all(torch.equal(x, y) for x, y in zip(step, want, strict=True))
        bank_push_(state, layout, frames[:, t : t + 1], victim=None if victim is None else victim[:, None], impl=impl)
        check_step(step, layout, before, state)
        # the decision handed back gives the same memory to the bit
        again = BankState(*(x.clone() for x in before))
        bank_push_(again, layout, frames[:, t : t + 1], victim=step.leaves[:, None], impl=impl)
        for column in ("entry", "order", "counter", "slots"):
            assert torch.equal(getattr(again, column).nan_to_num(), getattr(state, column).nan_to_num())


def test_a_chosen_slot_leaves(impl):
    layout = BankLayout((2, 2), 4, 4, (3,), ((2, 2),), "recent")
    state = layout.new_state(1, "cpu", torch.float32)
    frames = random_tensor(1, 5, 2, 2, 4)
    bank_push_(state, layout, frames[:, :3], impl=impl)
    bank_push_(state, layout, frames[:, 3:4], victim=torch.tensor([[[1]]]), impl=impl)
    assert state.entry[0, :, FRAME].tolist() == [0, 3, 2]
    # a slot that is not there leaves the choice to the rule
    bank_push_(state, layout, frames[:, 4:], victim=torch.tensor([[[7]]]), impl=impl)
    assert state.entry[0, :, FRAME].tolist() == [4, 3, 2]


@pytest.mark.parametrize(("slot", "spans"), [(2, [(0, 0), (1, 2), (3, 3)]), (0, [(0, 1), (2, 2), (3, 3)])])
def test_a_chosen_slot_is_merged_into_its_neighbour(impl, slot, spans):
    layout = BankLayout((1, 1), 4, 4, (3,), ((1, 1),), "merge")
    state = layout.new_state(1, "cpu", torch.float32)
    frames = random_tensor(1, 4, 1, 1, 4)
    bank_push_(state, layout, frames[:, :3], impl=impl)
    bank_push_(state, layout, frames[:, 3:], victim=torch.tensor([[[slot]]]), impl=impl)
    assert sorted((int(a), int(b)) for a, b in state.entry[0, :, 1:3]) == spans


def test_rows_without_a_stream_decide_nothing(impl):
    layout = CASES["paper"]
    state = layout.new_state(2, "cpu", torch.float32)
    step = bank_decide(state, layout, streams=torch.tensor([-1, 1, 2**40]), impl=impl)
    assert step.tier.tolist() == [-1, 0, -1]
    assert step.fresh.tolist() == [-1, 0, -1]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("stored", [torch.int8, torch.uint8])
@pytest.mark.parametrize("way", ["kernel", "operators"])
def test_few_bits_match_the_reference(name, stored, way, monkeypatch):
    layout, streams = QUANTIZED[name], torch.tensor([2, -1, 0])
    frames = video(layout, 3, 20, torch.bfloat16)
    low, state = (layout.new_state(3, "cpu", stored) for _ in range(2))
    bank_push_(low, layout, frames, streams=streams, impl="reference")
    if way == "kernel":
        bank_push_(state, layout, frames, streams=streams, impl="native")
    else:
        ops._push_quantized_(state, layout, frames, None, streams, None, "native")
    for column in ("entry", "order", "counter"):
        assert torch.equal(getattr(state, column), getattr(low, column)), column
    torch.testing.assert_close(state.mass, low.mass)
    # sums of another order may round a value to its neighbour, and those that come from it too
    off = (read_tokens(state, layout) - read_tokens(low, layout)).abs() / low.scale.clamp_min(1e-30)[..., None]
    assert float(off.max()) <= 2.01
    assert float((off > 0.5).float().mean()) < 0.02


def read_tokens(state: BankState, layout: BankLayout) -> Tensor:
    from vmemory.reference.quantize_slots import dequantize_slots

    return dequantize_slots(state.slots, state.scale, None, layout.dim)


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        (torch.zeros(2, 1, 3), "victim: expected torch.int64 of shape [2, 1, 3]"),
        (torch.zeros(2, 3, dtype=torch.int64), "victim: expected torch.int64 of shape [2, 1, 3]"),
        ([[0]], "victim: expected torch.int64 of shape [2, 1, 3], got list"),
    ],
)
def test_bad_victims(victim, words):
    layout = CASES["paper"]
    state = layout.new_state(2, "cpu", torch.float32)
    with pytest.raises(ValueError, match=re.escape(words)):
        bank_push_(state, layout, video(layout, 2, 1), victim=victim)
