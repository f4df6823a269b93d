"""What the episodic and the reservoir memory keep; the contract of all memories is tested in test_banks.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmemory import banks
from vmemory.reference.ring import similarity
from vmemory.testing import random_tensor

GRID, DIM = (4, 6), 8


def clip(T: int, seed: int = 0, **kind) -> Tensor:
    return random_tensor(T, *GRID, DIM, seed=seed, **kind)


@pytest.mark.parametrize(
    "options", [{"policy": "reservoir"}, {"policy": "episodic"}, {"policy": "episodic", "level": "flat"}]
)
def test_a_bank_without_memory_compresses_where_the_clip_is(options) -> None:
    here, nowhere = (
        banks.build_memory(dim=DIM, grid=GRID, capacity=3, grid_size=(2, 3), device=d, **options)
        for d in ("cpu", "meta")
    )
    mask = random_tensor(7, *GRID, seed=5) > -0.5
    wanted, found = (bank.compress(clip(7), mask=mask) for bank in (here, nowhere))
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.source, wanted.source)


@pytest.mark.parametrize("level", ["mean", "flat"])
@pytest.mark.parametrize("pooled", [None, (2, 3)])
def test_episodic_holds_what_the_rule_says(level: str, pooled: tuple[int, int] | None) -> None:
    video, M = clip(30), 5
    bank = banks.EpisodicBank(DIM, GRID, M, level=level, grid_size=pooled)
    for start in range(0, 30, 7):
        bank.push(video[start : start + 7])
    # what a frame is compared by: its mean as it comes, or its tokens as they are held
    if level == "mean":
        seen = video.flatten(1, 2).double().mean(1, keepdim=True)
    else:
        size = pooled or GRID
        seen = torch.nn.functional.adaptive_avg_pool2d(video.double().permute(0, 3, 1, 2), size)
        seen = seen.flatten(2).mT
    held = list(range(M))
    for t in range(M, 30):
        scores = similarity(seen[held], seen[t], "flat")
        best = scores.topk(2).values
        assert float(best[0] - best[1]) > 1e-6
        held[int(scores.argmax())] = t
    assert bank.entry[0, :, 0].tolist() == held
    assert bank.counts() == {"seen": 30, "skipped": 0, "dropped": 25, "held": 5}
    assert torch.equal(bank.read().frame.unique(), torch.tensor(sorted(held)))


def test_episodic_keeps_what_is_unlike_the_rest() -> None:
    still = clip(1).expand(50, -1, -1, -1).clone()
    for at in (10, 20, 30):
        still[at] = clip(1, seed=at)[0]
    bank = banks.EpisodicBank(DIM, GRID, 5)
    bank.push(still)
    assert {10, 20, 30, 49} < set(bank.entries().frame.tolist())


def test_episodic_replaces_a_broken_frame_first() -> None:
    video = clip(12)
    video[3] = torch.nan
    bank = banks.EpisodicBank(DIM, GRID, 6)
    bank.push(video[:6])
    assert 3 in bank.entries().frame.tolist()
    bank.push(video[6:7])
    assert 3 not in bank.entries().frame.tolist()
    assert not bank.read().tokens.isnan().any()


def test_reservoir_is_a_uniform_sample_and_the_newest_frame() -> None:
    T, M, runs = 25, 6, 300
    video = torch.zeros(T, 1, 1, 1)
    held = torch.zeros(T)
    for seed in range(runs):
        frames = banks.ReservoirBank(1, (1, 1), M, seed=seed).compress(video).frame
        assert frames.numel() == M
        assert int(frames[-1]) == T - 1
        held[frames] += 1
    share = (M - 1) / (T - 1)
    expected = runs * share
    # chi square of 24 frames, 23 degrees of freedom: 58.6 is exceeded by chance once in 15,000 draws
    spread = ((held[:-1] - expected) ** 2 / (expected * (1 - share))).sum()
    assert float(spread) < 58.6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), T=st.integers(0, 40), M=st.integers(1, 7), chunk=st.integers(1, 9))
def test_reservoir_repeats_however_frames_are_pushed(seed: int, T: int, M: int, chunk: int) -> None:
    video = clip(T)
    bank = banks.ReservoirBank(DIM, GRID, M, seed=seed)
    for start in range(0, T, chunk):
        bank.push(video[start : start + chunk])
    whole = banks.ReservoirBank(DIM, GRID, M, seed=seed).compress(video)
    assert torch.equal(bank.read().tokens, whole.tokens)
    assert torch.equal(bank.read().source, whole.source)
    assert bank.entries().frame.numel() == min(T, M)


def test_seeds_differ() -> None:
    video = clip(60)
    kept = {tuple(banks.ReservoirBank(DIM, GRID, 6, seed=seed).compress(video).frame.tolist()) for seed in range(20)}
    assert len(kept) == 20


@pytest.mark.parametrize("arguments", [{"policy": "episodic", "level": "flat"}, {"policy": "reservoir", "seed": 9}])
def test_settings_are_saved(arguments: dict, tmp_path) -> None:
    bank = banks.build_memory(dim=DIM, grid=GRID, capacity=4, **arguments)
    bank.push(clip(9))
    bank.save(tmp_path / "m.vmem")
    back, _ = banks.load(tmp_path / "m.vmem")
    assert back.to_dict() == bank.to_dict()
    for memory in (bank, back):
        memory.push(clip(20, seed=1))
    assert torch.equal(back.read().tokens, bank.read().tokens)
    assert torch.equal(back.read().source, bank.read().source)


@pytest.mark.parametrize("policy", ["episodic", "reservoir"])
@pytest.mark.parametrize("pooled", [None, (2, 3), (3, 4)])
def test_cells_that_do_not_exist_do_not_count(policy: str, pooled: tuple[int, int] | None) -> None:
    video, mask = clip(11), torch.rand(11, *GRID, generator=torch.Generator().manual_seed(2)) > 0.5
    poisoned = torch.where(mask[..., None], video, torch.nan)
    bank = banks.build_memory(policy, dim=DIM, grid=GRID, capacity=4, grid_size=pooled)
    ring = banks.RecentBank(DIM, GRID, 11, grid_size=pooled)
    bank.push(poisoned, mask=mask)
    ring.push(poisoned, mask=mask)
    held, everything = bank.read(), ring.read()
    assert not held.tokens.isnan().any()
    same = torch.isin(everything.frame, held.frame)
    assert torch.equal(held.source, everything.source[same])
    torch.testing.assert_close(held.tokens, everything.tokens[same])
    torch.testing.assert_close(held.weight, everything.weight[same])


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (ValueError, lambda: banks.EpisodicBank(8, GRID, 4, level="token"), "level: expected one of 'mean', 'flat'"),
        (ValueError, lambda: banks.EpisodicBank(8, GRID, 4, level="flat", key_dim=4), "key_dim: expected 8 for level"),
        (ValueError, lambda: banks.ReservoirBank(8, GRID, 4, seed=-1), "seed: expected between 0 and"),
        (TypeError, lambda: banks.ReservoirBank(8, GRID, 4, seed=0.5), "seed: expected an int"),
        (ValueError, lambda: banks.ReservoirBank(8, GRID), "capacity: expected exactly one of capacity and budget"),
    ],
)
def test_bad_arguments_are_named(error: type, call, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
