"""What single policies do, and arguments they refuse."""

from __future__ import annotations

import pytest
import torch

from tests.test_banks import DIM, GRID, clip, same
from vmemory import banks


@pytest.mark.parametrize("rule", ["paper", "videochat-online", "all-pairs"])
def test_intervals_route_frames_and_count_the_skipped(rule: str) -> None:
    bank = banks.HierarchicalBank(
        DIM, (4, 4), capacity=(2, 2, 3), grid_size=((4, 4), (2, 2), (1, 1)), rule=rule, intervals=(8, 4, 2)
    )
    video = torch.randn(33, 4, 4, DIM)
    for frame in video:
        bank.push(frame[None])
    counts = bank.counts()
    assert counts["skipped"] == 16
    assert counts["seen"] == counts["skipped"] + counts["dropped"] + counts["held"]
    assert all(frame % 2 == 0 for frame in bank.entries().frame.tolist())
    same(bank.compress(video), bank.read())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "best"}, "rule: expected one of"),
        ({"capacity": (1, 2), "budget": "1MiB"}, "budget: expected either"),
        ({"capacity": (1, -2)}, "capacity: expected at least 0"),
        ({"capacity": (1, 2), "grid_size": ((4, 6),)}, "grid_size: expected one per capacity"),
        ({"capacity": (1,), "grid_size": ((5, 6),)}, r"grid_size: expected between \(1, 1\) and \(4, 6\)"),
        ({"intervals": (8, 4, 2, 1)}, "intervals: expected at most one per tier"),
        ({"intervals": (0,)}, "intervals: expected at least 1"),
        ({"key_dim": DIM + 1}, "key_dim: expected between 1 and 8"),
        ({"streams": 0}, "streams: expected at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        banks.HierarchicalBank(DIM, GRID, **arguments)


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="policy: expected one of 'dual', 'episodic'"):
        banks.build_memory("perfect", dim=1, grid=(1, 1))


def test_uniform_spreads_over_everything_seen() -> None:
    bank = banks.UniformBank(DIM, GRID, 16)
    bank.push(clip(500))
    frames = bank.entries().frame
    assert int(frames[0]) == 0
    assert int(frames[-1]) == 499
    assert int(frames.diff().max()) <= 2 * 500 / 15 + 1


def test_merging_keeps_spans_and_weighted_means() -> None:
    video = clip(40)
    bank = banks.MergingBank(DIM, GRID, 5)
    bank.push(video, time=[float(i) for i in range(40)])
    entries, tokens = bank.entries(), bank.read()
    assert entries.first.tolist() == [0, *(entries.last[:-1] + 1).tolist()]
    assert int(entries.last[-1]) == 39
    for i, (first, last) in enumerate(zip(entries.first.tolist(), entries.last.tolist(), strict=True)):
        mean = video[first : last + 1].mean(0).flatten(0, 1)
        torch.testing.assert_close(tokens.tokens[i * 24 : (i + 1) * 24], mean, rtol=1e-4, atol=1e-4)
        assert float(entries.time[i]) == pytest.approx((first + last) / 2)
        assert float(tokens.weight[i * 24]) == last - first + 1


def test_tokens_of_a_clip_are_those_that_a_bank_would_give():
    clip = torch.randn(5, 2, 3, 4)
    bank = banks.RecentBank(4, (2, 3), 2)
    wanted = bank.compress(clip, torch.arange(5.0, dtype=torch.float64))
    made = banks.MemoryTokens.of(clip, wanted.source, torch.arange(5.0, dtype=torch.float64))
    for name, value in made._asdict().items():
        if value is not None:
            torch.testing.assert_close(value, getattr(wanted, name), rtol=0, atol=0)
    assert bool(banks.MemoryTokens.of(clip, wanted.source).time.isnan().all())
