"""Tuning: what is searched stays within its budget, a search goes on, and `attach` reads what it finds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import vmemory
from tests.commands import Run, clip, colours, expect_error, run
from vmemory.banks import MemoryConfig
from vmemory.data.world import World
from vmemory.eval.chart import draw_tuning, pareto
from vmemory.eval.features import Features
from vmemory.eval.objectives import LocalisationObjective, WorldObjective
from vmemory.eval.streams import world_stream
from vmemory.eval.trailer import Queries
from vmemory.eval.tune import SEARCHED, suggested, tokens_of, tune

optuna = pytest.importorskip("optuna")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
__all__ = ["clip", "colours", "run"]


class Known:
    """A score that is known: whole frames of the merging memory are best."""

    grid, dim, dtype = (4, 4), 16, torch.float32

    def __init__(self, stop_at: int | None = None) -> None:
        self.tried: list[MemoryConfig] = []
        self.stop_at = stop_at

    def score(self, config, report):
        if len(self.tried) == self.stop_at:
            raise KeyboardInterrupt
        self.tried.append(config)
        bank = config.build(self.dim, self.grid, device="meta")
        score = 0.5 * (config.policy == "merging") + 0.5 * (bank.tiers[0].grid == self.grid)
        for step in range(3):
            report(step, score)
        return score


def test_a_search_finds_what_is_best(tmp_path):
    objective = Known()
    [found] = tune(objective, tmp_path, ["96"], trials=40)
    assert found.score == 1.0
    assert found.best.policy == "merging"
    assert found.best.memory_capacities == (6,)
    assert json.loads((tmp_path / "best_96.json").read_text()) == found.best.to_dict()
    assert len(found.trials) == 40
    # the policy matters, parameters that it does not read do not
    assert max(found.importance, key=found.importance.__getitem__) in ("policy", "ratio")
    # bad trials stop early
    assert any(trial.score is None for trial in found.trials)
    draw_tuning([found], tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 1000


@pytest.mark.parametrize("budget", ["96", "24KiB"])
def test_every_trial_fills_its_budget(budget):
    objective = Known()
    size = 96 if budget == "96" else 24 * 1024
    for seed in range(10):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        config = suggested(study.ask(), objective, budget, SEARCHED)
        assert config is not None
        bank = config.build(objective.dim, objective.grid)
        bank.push(torch.randn(4 * max(bank.layout.capacities), 4, 4, 16))
        held = tokens_of(config, objective)
        used = held if budget == "96" else bank.nbytes
        largest = sum(math.prod(tier.grid) for tier in bank.tiers)
        assert used <= size
        assert int((bank.mass[0] > 0).sum()) <= held
        # one more entry would not fit
        assert used > size - largest * (1 if budget == "96" else 16 * 4 + 400)


def test_a_search_goes_on_after_an_interruption(tmp_path):
    whole = tune(Known(), tmp_path / "a", ["96", "48"], trials=4)
    stopped = Known(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        tune(stopped, tmp_path / "b", ["96", "48"], trials=4)
    counts: list[tuple[str, int]] = []
    rest = Known()
    again = tune(rest, tmp_path / "b", ["96", "48"], trials=4, done=lambda *count: counts.append(count))
    assert [len(one.trials) for one in again] == [4, 4]
    assert len(stopped.tried) + len(rest.tried) == 8
    assert counts[0] == ("96", 4)
    assert [one.score for one in again] == [one.score for one in whole]
    untouched = Known()
    tune(untouched, tmp_path / "b", ["96"], trials=4)
    assert untouched.tried == []


def test_bad_searches_are_named(tmp_path):
    for budgets, policies, message in (
        (["25%"], ["merging"], "budgets: expected tokens"), (["x"], ["merging"], "budgets: expected tokens"),
        (["96"], ["bogus"], "got 'bogus'"), (["96"], ["dual"], "without weights, got 'dual'"),
        ([], ["merging"], "at least one of each"), (["4"], ["recent"], "expected enough for a frame"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tune(Known(), tmp_path / message[:4], budgets, trials=20, policies=policies)
    tune(Known(), tmp_path / "s", ["96"], trials=1)
    with pytest.raises(ValueError, match="holds a search with seed 0, got 1"):
        tune(Known(), tmp_path / "s", ["96"], trials=1, seed=1)


def test_the_front_of_points():
    assert pareto([(2, 0.5), (1, 0.4), (2, 0.7), (3, 0.6), (4, 0.8)]) == [(1, 0.4), (2, 0.7), (4, 0.8)]
    assert pareto([]) == []


def test_the_score_of_a_world_is_that_of_an_evaluation():
    from vmemory.eval.cells import Cell
    from vmemory.eval.evaluate import evaluate
    from vmemory.eval.scoring import is_right
    from vmemory.train.worldlm import world_model, world_tokenizer

    model, tokenizer = world_model().eval(), world_tokenizer()
    streams = [world_stream(seed, 30, split="validation", moments=2) for seed in (1, 2)]
    objective = WorldObjective(model, tokenizer, streams, frame_tokens=4, max_new_tokens=2)
    assert (objective.grid, objective.dim) == ((2, 2), model.config.text_config.hidden_size)
    config = MemoryConfig(memory_policy="recent", memory_capacities=(6,))
    steps: list[float] = []
    score = objective.score(config, lambda step, value: steps.append(value))
    records = evaluate(model, tokenizer, streams, [Cell("x", config)], frame_tokens=4, max_new_tokens=2)
    right = {"now": [], "past": []}
    for stream in streams:
        for question, text in zip(stream.questions, records.get(stream.name, "x").written, strict=True):
            right[question.when].append(is_right(question, text))
    assert score == steps[-1] == pytest.approx(np.mean([np.mean(right["now"]), np.mean(right["past"])]))
    with pytest.raises(ValueError, match="streams: expected at least one"):
        WorldObjective(model, tokenizer, [])


def test_the_score_of_localisation_counts_moments_found():
    tokens = torch.randn(60, 3, 3, 8).half()
    film = Features(tokens, torch.arange(60, dtype=torch.float64), None)
    queries = Queries(film.pooled()[::4], film.time[::4], 0.5, 20.0)
    objective = LocalisationObjective(film, queries)
    whole = MemoryConfig(memory_policy="recent", memory_capacities=(60,))
    assert objective.score(whole, lambda *_: None) == 1.0
    half = MemoryConfig(memory_policy="recent", memory_capacities=(30,))
    assert objective.score(half, lambda *_: None) < 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model as a folder."""
    from vmemory.train.worldlm import world_model, world_tokenizer

    path = tmp_path_factory.mktemp("model")
    world_model().save_pretrained(path)
    world_tokenizer().save_pretrained(path)
    return path


def test_the_command_writes_settings_that_attach_reads(run: Run, folder, tmp_path):
    from vmemory.train.worldlm import world_model, world_tokenizer

    arguments = ("tune", "world", "--model", folder, "--budgets", "24,4KiB", "--streams", 1, "--seconds", 20)
    code, text, err = run(*arguments, "--trials", 2, "--out", tmp_path / "t")
    assert (code, err) == (0, "")
    assert "24" in text
    assert (tmp_path / "t" / "tuning.png").exists()
    model = world_model().eval()
    for budget in ("24", "4KiB"):
        settings = json.loads((tmp_path / "t" / f"best_{budget}.json").read_text())
        session = vmemory.VideoSession(model, world_tokenizer(), config=settings, frame_tokens=4)
        session.push(torch.from_numpy(World(1, 40).render()))
        assert session.num_tokens <= 24 or session.memory.nbytes <= 4096
        with vmemory.attach(model, config=settings) as handle:
            assert handle.config.to_dict() == settings


def test_bad_input_of_the_command(run: Run, tmp_path):
    expect_error(run("tune", "bogus", "--out", tmp_path), "objective: expected world or localisation, got 'bogus'")
    expect_error(run("tune", "world", "--model", tmp_path / "none", "--out", tmp_path), "none: no such folder")
