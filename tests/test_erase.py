"""Erasing a span of time, forking and preserving, on every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_banks import ENTRIES, clip, make, same
from tests.test_banks import POLICIES as ALL
from vmemory import banks

POLICIES = sorted(set(ALL) - {"dual"})
STORAGE = [torch.float32, "int8"]
HUGE = 1e20


def times(frames: int) -> torch.Tensor:
    return torch.arange(frames, dtype=torch.float64) * 0.5


def pushed(policy: str, video: torch.Tensor, time: torch.Tensor, **arguments) -> banks.Bank:
    bank = make(policy, **arguments)
    bank.push(video, time)
    return bank


def whole(policy: str) -> dict:
    """Arguments of a memory that holds nine frames without deciding anything."""
    if policy == "dual":
        return {"capacities": (9, 9)}
    return {"capacities": (9, 1, 3)} if policy == "hierarchical" else {"entries": 9}


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("t0", "t1", "left"), [(1.0, 2.0, [0, 1, 5, 6, 7]), (-5, 0, [1, 2, 3, 4, 5, 6, 7]), (3, 9, 6)])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_a_memory_that_never_saw_it(policy, t0, t1, left, dtype):
    left = list(range(left)) if isinstance(left, int) else left
    video, time = clip(30), times(30)
    bank = pushed(policy, video[:8], time[:8], dtype=dtype, **whole(policy))
    never = pushed(policy, video[left], time[left], dtype=dtype, **whole(policy))
    assert bank.erase(t0, t1) == 8 - len(left)
    same(bank.read(), never.read(), exact=True)
    for name, x, y in zip(bank.state._fields, bank.state, never.state, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    for t in range(8, 30):
        bank.push(video[t : t + 1], time[t : t + 1])
        never.push(video[t : t + 1], time[t : t + 1])
    same(bank.read(), never.read())
    assert bank.counts() == never.counts()


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"reservoir"}))
def test_no_byte_of_the_span_remains(policy, dtype, tmp_path: Path):
    """Frames of the span are so large that whatever is computed from one is large as well."""
    video, time = clip(4 * ENTRIES), times(4 * ENTRIES)
    span = range(ENTRIES + 2, 3 * ENTRIES)
    for t in span:
        video[t] += HUGE
    bank = make(policy, dtype=dtype)
    for t in range(len(video)):
        bank.push(video[t : t + 1], time[t : t + 1])
    touched = max(float(x.abs().nan_to_num(HUGE).max()) for x in bank.state if x.is_floating_point())
    gone = bank.erase(float(time[span[0]]), float(time[span[-1]]))
    assert gone > 0 or touched < HUGE
    bank.save(tmp_path / "a.vmem")
    for held in (bank, banks.load(tmp_path / "a.vmem")[0]):
        for name, x in held.state._asdict().items():
            if x.is_floating_point() and x.numel():
                # a cosine beside the span is computed from it, and small: links are checked below
                assert float(x.abs().max()) < 1e6, name
    kept = bank.read().time
    assert not bool(((kept >= time[span[0]]) & (kept <= time[span[-1]])).any())
    clean = bank.snapshot()
    bank._keep_only(0, torch.ones(bank.layout.slots, dtype=torch.bool), renumber=False)
    for name, x, y in zip(clean._fields, clean, bank.state, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"reservoir"}))
def test_slots_that_left_are_zero_and_the_memory_goes_on(policy):
    video, time = clip(60), times(60)
    bank = make(policy, streams=2)
    both = torch.stack([video, video.flip(0)])
    bank.push(both[:, :25], time[:25])
    other = bank.snapshot()
    before = bank.entries().time.tolist()
    gone = bank.erase(4.0, 6.0)
    held = bank.entries()
    if policy in ("recent", "uniform"):
        assert held.time.tolist() == [t for t in before if not 4 <= t <= 6]
    else:
        assert held.time.tolist() == [t for t in before if t < 4]
    assert gone == len(before) - len(held.time)
    free = bank.entry[0, :, 0] < 0
    assert int(free.sum()) == bank.layout.slots - len(held.time)
    assert not bank.descriptor[0, free].any()
    assert not bank.slots[0][bank.mass[0] == 0].any()
    for x, y in zip(bank.state, other, strict=True):
        assert torch.equal(x[1], y[1])
    counts = bank.counts()
    assert counts["held"] == len(held.time)
    if policy != "merging":
        assert counts["seen"] == counts["held"] + counts["dropped"] + counts["skipped"]
    bank.push(both[:, 25:], time[25:])
    assert bank.counts()["held"] == bank.layout.slots
    assert bank.read().time[-1] == time[-1]
    assert bool((bank.read().source.diff() > 0).all())


def test_a_reservoir_refuses_once_it_has_drawn():
    bank = pushed("reservoir", clip(20), times(20))
    before = bank.snapshot()
    with pytest.raises(ValueError, match="a reservoir's draws cannot be undone"):
        bank.erase(0, 100)
    same(bank.snapshot(), before, exact=True)
    assert bank.erase(1000, 2000) == 0


@pytest.mark.parametrize("policy", sorted(ALL))
def test_erase_refuses(policy):
    bank = make(policy, streams=2)
    bank.push(torch.stack([clip(3)] * 2))
    before = bank.snapshot()
    for arguments, words in (
        ((0.0, 1.0), "time: frames that were pushed without times"),
        ((2.0, 1.0), r"t1: expected at least t0 = 2 s, got 1 s"),
        ((float("nan"), 1.0), "t0: expected seconds, got nan"),
        ((0, 1, 2), "stream: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            bank.erase(*arguments)
    with pytest.raises(ValueError, match="t0: expected seconds"):
        bank.erase("now", 1)
    same(bank.snapshot(), before, exact=True)


@pytest.mark.parametrize("policy", sorted(ALL))
def test_nothing_in_the_span_changes_nothing(policy):
    bank = pushed(policy, clip(20), times(20))
    before = bank.snapshot()
    assert bank.erase(100.0, 200.0) == 0
    same(bank.snapshot(), before, exact=True)
    assert make(policy).erase(0, 1) == 0


@pytest.mark.parametrize("policy", sorted(ALL))
def test_fork_is_a_bank_of_its_own(policy):
    bank = pushed(policy, clip(15), times(15))
    fork, held = bank.fork(), bank.snapshot()
    same(fork.snapshot(), held, exact=True)
    fork.push(clip(5, seed=9), times(5) + 100)
    same(bank.snapshot(), held, exact=True)
    bank.push(clip(5, seed=9), times(5) + 100)
    same(fork.snapshot(), bank.snapshot(), exact=True)


@pytest.mark.parametrize("policy", sorted(ALL))
def test_fork_at_a_time(policy):
    bank = pushed(policy, clip(8), times(8), **whole(policy))
    same(bank.fork(1.7).read(), pushed(policy, clip(8)[:4], times(8)[:4], **whole(policy)).read(), exact=True)
    same(bank.fork(99).snapshot(), bank.snapshot(), exact=True)
    assert len(bank.fork(-1).read().tokens) == 0
    full = pushed(policy, clip(30), times(30))
    with pytest.raises(ValueError, match=r"time: expected a second since which nothing was given up, got 1\.5 s"):
        full.fork(1.5)


@pytest.mark.parametrize("policy", sorted(ALL))
def test_preserved_puts_the_state_back(policy):
    bank = pushed(policy, clip(10), times(10))
    before, places = bank.snapshot(), [x.data_ptr() for x in bank.state]
    with bank.preserved():
        bank.push(clip(7, seed=3), times(7) + 50)
    same(bank.snapshot(), before, exact=True)

    def fail() -> None:
        with bank.preserved():
            bank.push(clip(7, seed=3), times(7) + 50)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    same(bank.snapshot(), before, exact=True)
    assert places == [x.data_ptr() for x in bank.state]


@pytest.mark.parametrize("slots", ["tokens", "means"])
def test_dual_memory_goes_back_to_before_the_span(slots, tmp_path: Path):
    video, time = clip(30), times(30)
    arguments = {"capacities": (4, 5), "slots": slots, "streams": 2}
    bank = make("dual", **arguments)
    before = make("dual", **arguments)
    before.load_state_dict(bank.state_dict())
    both = torch.stack([video, video.flip(0)])
    bank.push(both[:, :3], time[:3])
    before.push(both[:, :3], time[:3])
    video[3] = HUGE
    bank.push(both[:, 3:4], time[3:4])
    assert bank.erase(1.2, 1.6) == 2
    for name, x, y in zip(bank.state._fields, bank.state, before.state, strict=True):
        assert torch.equal(x[0].nan_to_num(7), y[0].nan_to_num(7)), name
    same(bank.read(0), before.read(0), exact=True)
    assert len(bank.read(1).time) > len(bank.read(0).time)
    bank.push(both[:, 4:], time[4:])
    bank.erase(5.0, 6.0)
    assert bool((bank.read(0).time < 5).all())
    bank.push(both[:, :2], time[:2] + 100)
    assert bank.read(0).time.max() == 100.5
