from __future__ import annotations

import pytest
import torch

from vmemory.banks import MergingBank
from vmemory.data import trailer_to_film
from vmemory.eval import Features
from vmemory.eval.setups import Setup, means, setups
from vmemory.eval.trailer import Queries, Score, by_bytes, by_entries, evaluate, of_dual, trailer_queries


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


def _score(setup: Setup, film: Features, queries: Queries, entries: int) -> Score:
    return evaluate(setup.bank(9, film.tokens.shape[3], entries=entries), setup, film, queries)


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
    setup = Setup("recent", keep=9, calibrated=calibrated)
    score = _score(setup, film, queries, 80)
    assert score[:5] == (setup, 11, 11, 11, 0.0)
    assert score.nbytes == setup.bank(9, 32, entries=80).nbytes
    assert score.held == 80
    assert score.push > 0
    assert score.missed == ()
    # the tokens given back are those of the moment itself, up to float16
    assert score.detail == pytest.approx(1.0, abs=1e-4)


def test_detail_is_what_is_left_of_the_tokens() -> None:
    # frames whose nine blocks of 3 x 3 cells differ, and whose cells within a block do not
    blocks = torch.randn(12, 3, 3, 32, generator=torch.Generator().manual_seed(0))
    tokens = blocks.repeat_interleave(3, 1).repeat_interleave(3, 2).half()
    film = Features(tokens, torch.arange(12).double(), None)
    queries = Queries(film.pooled(), film.time)
    whole, third, one = (_score(Setup("recent", keep=keep), film, queries, 12) for keep in (9, 3, 1))
    assert whole.hits == third.hits == one.hits == 12
    assert whole.detail == pytest.approx(1.0, abs=1e-4)
    assert third.detail == pytest.approx(1.0, abs=1e-3)
    assert one.detail < 0.6


def test_the_last_frames_know_nothing_of_the_first() -> None:
    film = _features(_shots(10, 8))
    queries = Queries(film.pooled()[:40:5], film.time[:40:5])
    score = _score(Setup("recent", keep=9), film, queries, 20)
    assert (score.hits, score.exact) == (0, 0)
    assert score.missed == tuple(range(8))
    assert score.error >= 20


def test_spans_count_up_to_a_limit_and_not_exactly() -> None:
    # shots of 4, 18, 30 and 0 seconds become one entry each
    generator = torch.Generator().manual_seed(0)
    shots, lengths = torch.randn(4, 32, generator=generator), [5, 19, 31, 1]
    film = _features(shots.repeat_interleave(torch.tensor(lengths), 0))
    bank = MergingBank(32, (9, 9), 4, dtype=torch.float16)
    truth = torch.tensor([0.0, 8.0, 29.0, 54.0, 55.0], dtype=torch.float64)
    queries = Queries(shots[[0, 1, 2, 2, 3]], truth)
    score = evaluate(bank, Setup("merging", keep=9, calibrated=False), film, queries)
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
        _score(Setup("merging", keep=9, calibrated=calibrated), film, queries, 40) for calibrated in (False, True)
    )
    assert calibrated.hits >= plain.hits + 10


def test_tables_cover_every_memory_and_size() -> None:
    film = _features(_shots(6, 10), 2.0)
    queries = Queries(film.pooled()[::9], film.time[::9])
    (unbounded,), *groups = by_entries(film, queries, (16, 24))
    assert (unbounded.setup.policy, unbounded.hits, unbounded.held) == ("unbounded", len(queries.truth), 60)
    hierarchical = {("hierarchical", rule) for rule in ("paper", "videochat-online", "all-pairs")}
    others = {(policy, None) for policy in ("merging", "episodic", "uniform", "reservoir", "recent")}
    for group, entries in zip(groups, (16, 24), strict=True):
        assert {(s.setup.policy, s.setup.rule) for s in group} == hierarchical | others
        assert {s.setup.keep for s in group} == {None, 9}
        assert {s.setup.policy for s in group if not s.setup.calibrated} == {p for p, _ in hierarchical | others}
        assert all(s.held <= entries for s in group)
    budgets = (100_000, 200_000)
    for budget, group in zip(budgets, by_bytes(film, queries, budgets, ("float16", "int4")), strict=True):
        assert [s.setup for s in group] == [*setups(9), *setups(9, "int4")]
        assert all(0.7 * budget < s.nbytes <= budget for s in group)
        held = {s.setup: s.held for s in group}
        assert held[Setup("hierarchical", "paper")] > held[Setup("merging", keep=9)]
        assert held[Setup("merging", keep=3)] > held[Setup("merging", keep=9)]


def test_the_dual_memory_is_looked_up_by_its_slots() -> None:
    film = _features(_shots(6, 10), 2.0)
    last = Queries(film.pooled()[-3:], film.time[-3:])
    for score, rule in zip(of_dual(film, last, 15), ("most-similar", "bridged"), strict=True):
        assert (score.setup.policy, score.setup.rule, score.held) == ("dual", rule, 15)
        # the working memory holds the last three frames as they were
        assert score.exact == 3
        assert score.detail == pytest.approx(1.0, abs=1e-4)


def test_few_bits_find_as_much_in_fewer_bytes() -> None:
    film = _features(_shots(6, 10), 2.0)
    queries = Queries(film.pooled()[::9], film.time[::9])
    for setup in (setup for setup in setups(9, rules=False) if setup.keep != 3):
        wide = _score(setup, film, queries, 16)
        for dtype in ("int8", "int4"):
            few = _score(setup._replace(dtype=dtype), film, queries, 16)
            assert few.nbytes < wide.nbytes
            assert few.held == wide.held
            assert abs(few.hits - wide.hits) <= 1


def test_what_is_looked_up_in_few_bits_are_the_tokens_it_gives_back() -> None:
    film = _features(_shots(6, 10), 2.0)
    queries = Queries(film.pooled()[::9], film.time[::9])
    setup = Setup("recent", keep=9, dtype="int4", calibrated=False)
    bank = setup.bank(9, 32, entries=60)
    assert evaluate(bank, setup, film, queries).hits == len(queries.truth)
    bank.scale.zero_()
    found = means(bank.read(), bank.entries().frame)
    assert found.shape == (60, 32)
    assert not found.any()


def test_names_in_tables() -> None:
    assert Setup("merging", keep=3).name == "merging, 3×3"
    assert Setup("hierarchical", "paper").name == "hierarchical"
    assert Setup("hierarchical", "all-pairs").name == "hierarchical, all-pairs"
