"""Find the best settings of a memory of a given size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vmemory._files import replacing
from vmemory.banks import MemoryConfig
from vmemory.banks.layout import parse_bytes
from vmemory.eval.cells import check_budget, config_of, is_bytes
from vmemory.eval.objectives import Objective

# policies that are searched where no others are named: those without weights
SEARCHED = ("merging", "uniform", "hierarchical", "episodic", "recent", "reservoir")
_RULES = ("paper", "videochat-online", "all-pairs")
_MOST_TOKENS = 2**30


class Trial(NamedTuple):
    """A tried memory.

    Attributes:
        number: Of the trial in its study.
        score: None for a trial that was stopped early or failed.
        tokens: Visual tokens that the memory holds when it is full.
        nbytes: Bytes of the memory.
        config: Its settings.
    """

    number: int
    score: float | None
    tokens: int
    nbytes: int
    config: dict[str, Any]


class Tuned(NamedTuple):
    """The result for one budget: its best settings, their score, all trials, and the importance of each parameter."""

    budget: str
    best: MemoryConfig
    score: float
    trials: list[Trial]
    importance: dict[str, float]


def tune(
    objective: Objective,
    folder: str | Path,
    budgets: Sequence[str],
    *,
    trials: int = 40,
    policies: Sequence[str] = SEARCHED,
    seed: int = 0,
    done: Callable[[str, int], None] | None = None,
) -> list[Tuned]:
    """Search policy, capacities, sizes, rule and interval of a memory at each of several sizes.

    Trials are in `folder/trials.db`, an SQLite file of optuna: a further call goes on until there are as many as asked
    for. Trials that are worse than the median of the earlier ones at the same step are stopped.

    Args:
        objective: The score.
        folder: Takes `trials.db` and, for each budget, `best_<budget>.json`: settings that `attach` reads.
        budgets: Sizes: tokens (`"96"`) or bytes (`"64KiB"`).
        trials: Trials for each budget, those before included.
        policies: Those to search.
        seed: Of the search.
        done: Called with a budget and its number of finished trials.

    Returns:
        A result for each budget.

    Raises:
        ValueError: An unknown policy, a budget of another form or too small for a frame, or a file of another search.
        ModuleNotFoundError: optuna is not installed.
    """
    import optuna

    for budget in budgets:
        check_budget(budget)
        if budget.endswith("%"):
            raise ValueError(f"budgets: expected tokens ('96') or bytes ('64KiB'), got {budget!r}")
        if filled(MemoryConfig(memory_policy="merging"), objective, budget) is None:
            raise ValueError(f"budgets: expected enough for a frame of {objective.grid} tokens, got {budget!r}")
    if not budgets or not policies:
        raise ValueError("budgets, policies: expected at least one of each")
    for policy in policies:
        if config_of(policy).policy == "dual":
            raise ValueError("policies: expected those without weights, got 'dual'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = f"sqlite:///{folder / 'trials.db'}"
    facts = {"policies": list(policies), "grid": list(objective.grid), "dim": objective.dim, "seed": seed}
    found = []
    for budget in budgets:
        study = optuna.create_study(
            storage=storage, study_name=budget, direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=1),
        )  # fmt: skip
        _check_facts(folder, study, facts)
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            # its process has ended
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        while (count := len(_finished(study))) < trials:
            # the search goes on as if it had not been interrupted
            study.sampler = optuna.samplers.TPESampler(seed=seed * 1_000_003 + count, multivariate=True)
            study.optimize(partial(_tried, objective=objective, budget=budget, policies=policies), n_trials=1)
            if done is not None:
                done(budget, count + 1)
        found.append(_result(study, budget))
        with replacing(folder / f"best_{budget}.json") as path:
            path.write_text(json.dumps(found[-1].best.to_dict(), indent=1))
    return found


def _check_facts(folder: Path, study: Any, facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        known = study.user_attrs.get(name)
        if known is None:
            study.set_user_attr(name, value)
        elif known != value:
            raise ValueError(f"{folder}: holds a search with {name} {known}, got {value}; use another folder")


def _finished(study: Any) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def _tried(trial: Any, objective: Objective, budget: str, policies: Sequence[str]) -> float:
    import optuna

    config = suggested(trial, objective, budget, policies)
    if config is None:
        raise optuna.TrialPruned
    probe = config.build(objective.dim, objective.grid, dtype=objective.dtype, device="meta")
    trial.set_user_attr("config", config.to_dict())
    trial.set_user_attr("tokens", tokens_of(config, objective))
    trial.set_user_attr("nbytes", probe.nbytes)

    def report(step: int, score: float) -> None:
        trial.report(score, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    return objective.score(config, report)


def suggested(trial: Any, objective: Objective, budget: str, policies: Sequence[str]) -> MemoryConfig | None:
    """Let a trial choose settings that fill a budget; None if the budget does not hold an entry of each size.

    Every trial chooses all parameters, so that their importance can be compared; a policy uses those that it has.
    """
    grid = objective.grid
    policy = trial.suggest_categorical("policy", list(policies))
    ratio = trial.suggest_int("ratio", 1, min(4, *grid))
    share = trial.suggest_float("first", 0.1, 0.9)
    rule = trial.suggest_categorical("rule", list(_RULES))
    interval = trial.suggest_categorical("interval", [1, 2, 4])
    config = config_of(policy)
    if config.policy != "hierarchical":
        config = replace(config, memory_downsample_ratios=(ratio,))
    else:
        # the second tier is smaller than the first, where frames have tokens enough
        ratios = (1, min(max(2, ratio), *grid))
        steps = (interval, 1) if interval > 1 else None
        config = replace(config, memory_rule=rule, memory_downsample_ratios=ratios, memory_intervals=steps)
    return filled(config, objective, budget, share)


def filled(config: MemoryConfig, objective: Objective, budget: str, share: float = 0.5) -> MemoryConfig | None:
    """Return settings with as many entries as a budget of tokens or bytes holds; None if a tier has no entry.

    Args:
        config: Settings without a size, with a ratio for each tier.
        objective: Tells the form of the frames.
        budget: Tokens, or bytes of the whole memory.
        share: Of the tokens, those of the first of two tiers, at least one entry.
    """
    (H, W), ratios = objective.grid, config.memory_downsample_ratios or (1,)
    sizes = [max(H // ratio, 1) * max(W // ratio, 1) for ratio in ratios]

    def made(tokens: int) -> MemoryConfig | None:
        first = tokens if len(sizes) == 1 else max(int(share * tokens), sizes[0])
        counts = (first // sizes[0], (tokens - first) // sizes[-1])[: len(sizes)]
        return replace(config, memory_capacities=counts) if min(counts) >= 1 else None

    if not is_bytes(budget):
        return made(int(budget))
    size = parse_bytes(budget)

    def fits(tokens: int) -> bool:
        tried = made(tokens)
        if tried is None:
            return True
        return tried.build(objective.dim, objective.grid, dtype=objective.dtype, device="meta").nbytes <= size

    low, high = 0, 1
    while high < _MOST_TOKENS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return made(low)


def tokens_of(config: MemoryConfig, objective: Objective) -> int:
    """Return the visual tokens that a memory of these settings holds when it is full."""
    bank = config.build(objective.dim, objective.grid, dtype=objective.dtype, device="meta")
    capacities = config.memory_capacities or (bank.capacity,)
    return sum(count * math.prod(tier.grid) for count, tier in zip(capacities, bank.tiers, strict=True))


def _result(study: Any, budget: str) -> Tuned:
    import optuna

    trials = [
        Trial(t.number, t.value if t.state.name == "COMPLETE" else None, *(t.user_attrs[n] for n in Trial._fields[2:]))
        for t in _finished(study)
        if "config" in t.user_attrs
    ]
    best = study.best_trial
    importance: dict[str, float] = {}
    values = {trial.score for trial in trials if trial.score is not None}
    if len(values) > 1:
        # how far the better half of the trials differs from all in a parameter
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
        importance = dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    return Tuned(budget, MemoryConfig.from_dict(best.user_attrs["config"]), best.value, trials, importance)
