from __future__ import annotations

import pytest
import torch

from vmemory.banks import MergingBank
from vmemory.data import trailer_to_film
from vmemory.eval import Features
from vmemory.eval.trailer import (
    BOUNDED,
    Queries,
    _means,
    by_bytes,
    by_entries,
    by_storage,
    evaluate,
    trailer_queries,
)
from vmemory.stream.video_bank import video_bank


def _features(pooled: torch.Tensor, fps: float = 1.0) -> Features:
    """Token grids 9 x 9 whose mean is `pooled` `[N, D]`."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(pooled), 81, pooled.shape[1], generator=generator)
    tokens = pooled[:, None] + 0.1 * (noise - noise.mean(1, keepdim=True))
    return Features(tokens.reshape(-1, 9, 9, pooled.shape[1]).half(), torch.arange(len(pooled)).double() / fps, None)


def _shots(count: int, length: int, dim: int = 32) -> torch.Tensor:
    """Shots that differ, frames within a shot nearly alike."""
    generator = torch.Generator().manual_seed(0)
    shots = torch.randn(count, 1, dim, generator=generator)
    return (shots + 0.05 * torch.randn(count, length, dim, generator=generator)).flatten(0, 1)


def test_queries_keep_away_from_cuts() -> None:
    times = torch.arange(111, dtype=torch.float64) / 2
    trailer = Features(torch.randn(111, 9, 9, 4).half(), times, None)
    queries = trailer_queries(trailer)
    assert len(queries.truth) == 90
    asked = [t for t in times.tolist() if trailer_to_film(t) in queries.truth.tolist()]
    assert queries.truth.tolist() == [trailer_to_film(t) for t in asked]
    assert torch.equal(queries.pooled, trailer.pooled()[(2 * torch.tensor(asked)).long()])
    # fades: the first picture of each clip is black, and clips cross-fade at 45.75 s
    assert not {0.0, 10.0, 14.0, 32.0, 36.0, 45.5, 46.0, 48.5, 50.0} & set(asked)
    assert {0.5, 9.5, 10.5, 45.0, 46.5, 48.0} <= set(asked)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_memory_of_everything_finds_everything(calibrated: bool) -> None:
    pooled = _shots(10, 8)
    film = _features(pooled)
    queries = Queries(film.pooled()[3::7], film.time[3::7])
    bank = video_bank("recent", 9, 32, entries=80)
    score = evaluate(bank, film, queries, calibrated=calibrated, policy="unbounded")
    assert score[:7] == ("unbounded", calibrated, "float16", 11, 11, 11, 0.0)
    assert score.nbytes == bank.nbytes
    assert score.held == 80
    assert score.push > 0


def test_the_last_frames_know_nothing_of_the_first() -> None:
    film = _features(_shots(10, 8))
    queries = Queries(film.pooled()[:40:5], film.time[:40:5])
    score = evaluate(video_bank("recent", 9, 32, entries=20), film, queries)
    assert (score.hits, score.exact) == (0, 0)
    assert score.error >= 20


def test_spans_count_up_to_a_limit_and_not_exactly() -> None:
    # shots of 4, 18, 30 and 0 seconds become one entry each
    generator = torch.Generator().manual_seed(0)
    shots, lengths = torch.randn(4, 32, generator=generator), [5, 19, 31, 1]
    film = _features(shots.repeat_interleave(torch.tensor(lengths), 0))
    bank = MergingBank(32, (9, 9), 4, dtype=torch.float16)
    truth = torch.tensor([0.0, 8.0, 29.0, 54.0, 55.0], dtype=torch.float64)
    queries = Queries(shots[[0, 1, 2, 2, 3]], truth)
    score = evaluate(bank, film, queries)
    assert bank.entries().frames.tolist() == lengths
    # entry times 2, 14, 39 and 55: errors 2, 6, 10, 15 and 0, spans 4, 18, 30, 30 and 0
    assert (score.hits, score.exact, score.error) == (3, 1, 6.0)


def test_calibration_frees_a_memory_from_what_frames_share() -> None:
    # shots that differ little beside a common part are folded together before noisy ones, although all differ
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.15] * 15 + [1.0] * 15)[:, None, None]
    shots = scale * (torch.randn(30, 1, 32, generator=generator) + 0.3 * torch.randn(30, 10, 32, generator=generator))
    film = _features(shots.flatten(0, 1) + 3.0)
    queries = Queries(film.pooled()[5::10], film.time[5::10])
    plain, calibrated = (
        evaluate(video_bank("merging", 9, 32, entries=40), film, queries, calibrated=c) for c in (False, True)
    )
    assert calibrated.hits >= plain.hits + 10


def test_tables_cover_every_memory_and_size() -> None:
    film = _features(_shots(6, 10), 2.0)
    queries = Queries(film.pooled()[::9], film.time[::9])
    rows = by_entries(film, queries, (16, 24))
    assert [[(s.policy, s.calibrated) for s in group] for group in rows] == [
        [("unbounded", False)],
        list(BOUNDED),
        list(BOUNDED),
    ]
    assert [{s.held for s in group} for group in rows] == [{60}, {16}, {24}]
    assert rows[0][0].hits == len(queries.truth)
    for budget, group in zip((100_000, 200_000), by_bytes(film, queries, (100_000, 200_000)), strict=True):
        assert [(s.policy, s.calibrated) for s in group] == list(BOUNDED)
        assert all(0.7 * budget < s.nbytes <= budget for s in group)
        by_name = {s.policy: s.held for s in group}
        assert by_name["hierarchical"] > by_name["merging"]


def test_few_bits_find_as_much_in_fewer_bytes() -> None:
    film = _features(_shots(6, 10), 2.0)
    queries = Queries(film.pooled()[::9], film.time[::9])
    full = by_entries(film, queries, (16,))[1]
    stored = by_storage(film, queries, (16,))
    assert [{s.dtype for s in group} for group in stored] == [{"int8"}, {"int4"}]
    for group in stored:
        for few, wide in zip(group, full, strict=True):
            assert few[:2] == wide[:2]
            assert few.nbytes < wide.nbytes
            assert few.held == wide.held
            assert abs(few.hits - wide.hits) <= 1


def test_what_is_looked_up_in_few_bits_are_the_tokens_it_gives_back() -> None:
    film = _features(_shots(6, 10), 2.0)
    queries = Queries(film.pooled()[::9], film.time[::9])
    bank = video_bank("recent", 9, 32, entries=60, dtype="int4")
    assert evaluate(bank, film, queries).hits == len(queries.truth)
    bank.scale.zero_()
    means = _means(bank.read(), bank.entries().frame)
    assert means.shape == (60, 32)
    assert not means.any()
