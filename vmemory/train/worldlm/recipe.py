"""The recipe from nothing to a model that answers, in one function."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmemory._files import replacing
from vmemory.data.world import Question, View, World, ask, blind_accuracy, chance
from vmemory.train.worldlm.clips import Asked, Watched, draw_clip, seen, watch
from vmemory.train.worldlm.eyes import fit_patches, train_tower
from vmemory.train.worldlm.language import Phase, align, answered, train_language
from vmemory.train.worldlm.model import world_model
from vmemory.train.worldlm.words import world_tokenizer

# short clips first: words have to be found in tokens before they are found in streams
PHASES = (Phase(420, 20, 1, 12, 12), Phase(1100, 8, 3, 56, 18), Phase(570, 4, 4, 210, 28))

# share of right answers from which on a kind is not called weak
GOOD = 0.8

# the model that comes with the package
SHIPPED = Path(__file__).with_name("weights")


def train_worldlm(
    folder: str | Path, *, seed: int = 0, scale: float = 1.0, tell: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Train a small video language model on the world and write it to a folder.

    The patch embedding is fitted by ridge regression, the tower learns what tiles and cells show and is frozen, the
    projector learns to say it in word vectors, and the language model learns to answer, on clips that grow longer.

    Args:
        folder: Takes the model, the tokenizer, `metrics.json` and `README.md`; made where it is missing.
        seed: Of everything that is drawn. Bits depend on the machine and the number of threads, accuracies hardly.
        scale: Share of the steps and worlds; less than 1 is for trying whether it runs.
        tell: Called with a line after each stage.

    Returns:
        What is in `metrics.json`: CPU seconds a stage, losses, and accuracies by kind on the test split.

    Raises:
        ValueError: A scale outside of 0 … 1.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale: expected more than 0 and at most 1, got {scale}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tell = tell or (lambda line: None)

    def some(number: int) -> int:
        return max(2, round(number * scale))

    started = clock.process_time()
    metrics: dict[str, Any] = {"seed": seed, "scale": scale, "cpu_seconds": {}}

    def stage(name: str, result: object) -> None:
        metrics["cpu_seconds"][name] = round(clock.process_time() - started, 1)
        metrics[name] = result
        tell(f"{metrics['cpu_seconds'][name]:7.0f} CPU s  {name}: {_short(result)}")

    model = world_model(seed)
    metrics["parameters"] = sum(weight.numel() for weight in model.parameters())
    tower = model.model.vision_model
    first = 1_000_000 * seed
    fit_patches(tower, some(160), first)
    stage("tower", train_tower(tower, some(500), first + 1000))
    for weight in tower.parameters():
        weight.requires_grad_(False)
    watched = watch(tower, range(first + 100_000, first + 100_000 + some(200)), 256)
    stage("watched", len(watched))
    stage("unexplained", align(model, watched, some(2500), seed))
    # steps of Muon would soon have it say what nobody asks for yet in no words at all
    for weight in model.model.projector.parameters():
        weight.requires_grad_(False)
    rng = np.random.RandomState([seed, 3])
    held_out = [
        draw_clip(one, rng, 60, 60, (), 16) for one in watch(tower, range(first, first + some(80)), 64, "validation")
    ]
    phases = [phase._replace(steps=some(phase.steps)) for phase in PHASES]

    def learned(entry: dict[str, Any]) -> None:
        now, past = summary(entry["accuracy"]).values()
        spent = clock.process_time() - started
        tell(f"{spent:7.0f} CPU s  {entry['steps']} steps, on validation: now {now:.3f}, past {past:.3f}")

    stage("language", train_language(model, watched, phases, held_out, seed, learned))
    # what is written is what is measured
    model.to(torch.bfloat16).float().eval()
    for seconds in (60, 240):
        clips = streams(tower, range(first, first + some(60)), seconds)
        stage(f"test_{seconds}", answered(model, clips, 4))
        asked = [question for clip in clips for question in clip.questions]
        stage(f"blind_{seconds}", blind_accuracy(_known(range(first, first + some(250)), seconds), asked))
    save(folder, model, metrics)
    return metrics


def streams(tower: Any, seeds: range, seconds: int, split: str = "test") -> list[Asked]:
    """Ask about whole streams, at moments of their last three quarters, with all that was seen by then."""
    out = []
    for seed in seeds:
        world = World(seed, seconds, split=split)
        watched = Watched(world, np.arange(seconds), seen(tower, world, np.arange(seconds)))
        for past, questions in _moments(world):
            out.append(Asked(watched, past, past, questions))
    return out


def _moments(world: World) -> Iterator[tuple[np.ndarray, list[Question]]]:
    """Yield all seconds up to each of four moments, and questions about them."""
    rng = np.random.RandomState([world.seed, 4])
    for now in np.linspace(world.seconds // 4, world.seconds - 1, 4).astype(int).tolist():
        past = np.arange(now + 1)
        yield past, ask(View(world, past), rng, None, 16)


def _known(seeds: range, seconds: int) -> list[Question]:
    """Ask about worlds of the training split, which one who sees nothing knows the answers of."""
    return [question for seed in seeds for _, asked in _moments(World(seed, seconds)) for question in asked]


def summary(accuracy: dict[str, float]) -> dict[str, float]:
    """Compute the mean of the kinds about now, and of those about the past."""
    out = {}
    for when in ("now", "past"):
        own = [share for kind, share in accuracy.items() if kind.startswith(when)]
        out[when] = sum(own) / len(own) if own else float("nan")
    return out


def save(folder: Path, model: Any, metrics: dict[str, Any]) -> None:
    """Write the model in bfloat16, its tokenizer, its metrics and its card."""
    model.to(torch.bfloat16).save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    with replacing(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1))
    with replacing(folder / "README.md") as path:
        path.write_text(card(metrics))


def load_worldlm(folder: str | Path | None = None) -> tuple[Any, Any]:
    """Load a model that `train_worldlm` wrote, without network.

    Args:
        folder: Where it is; None = the one that comes with the package.

    Returns:
        The model, a `VideoLlama3ForConditionalGeneration` in float32 and in evaluation mode, and its tokenizer, which
        is all the processor that a session over it needs.

    Raises:
        OSError: The folder holds no model.
    """
    import transformers

    folder = SHIPPED if folder is None else folder
    model = transformers.VideoLlama3ForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def card(metrics: dict[str, Any]) -> str:
    """Write the model card, of nothing but what was measured."""
    spent = max(metrics["cpu_seconds"].values())
    trial = "" if metrics["scale"] == 1 else f", a trial with `--scale {metrics['scale']:g}`"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "---",
        "",
        "# worldlm",
        "",
        f"A video language model of VideoLLaMA3's architecture with {metrics['parameters']:,} parameters, trained from",
        "nothing on `vmemory.data.world`, whose streams are drawn and whose answers are known. It knows nothing else.",
        "",
        f"`vmemory train worldlm --seed {metrics['seed']}` makes it again. It took {spent:.0f} CPU seconds{trial}.",
        "The patch embedding is fitted by ridge regression, which is unusual. The tower is frozen while language is",
        "learned.",
        "",
        "Exact answers by kind on 60 worlds of the test split, asked at four moments each, all frames in the prompt.",
        "Blind sees no picture: it knows the answers to such questions about 250 worlds of the training split, and",
        "gives the most frequent answer to the same words.",
        "",
        "| kind | 60 s | blind | chance | 240 s | blind | chance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    measured = [metrics[name] for name in ("test_60", "blind_60", "test_240", "blind_240")]
    for kind in measured[0]:
        short, blind, long, late = (f"{shares.get(kind, float('nan')):.3f}" for shares in measured)
        luck = [f"{chance(kind, seconds):.3f}" for seconds in (60, 240)]
        label = "" if measured[0][kind] >= GOOD else " (weak)"
        lines.append(f"| {kind}{label} | {short} | {blind} | {luck[0]} | {long} | {late} | {luck[1]} |")
    for when in ("now", "past"):
        short, blind, long, late = (f"{summary(shares)[when]:.3f}" for shares in measured)
        lines.append(f"| **{when}**, mean of kinds | {short} | {blind} | | {long} | {late} | |")
    return "\n".join([*lines, ""])


def _short(result: object) -> str:
    if isinstance(result, list) and result and isinstance(result[-1], dict):
        return _short(result[-1]["accuracy"])
    if isinstance(result, dict):
        return ", ".join(f"{name} {value:.2f}" for name, value in result.items())
    return f"{result:.3f}" if isinstance(result, float) else str(result)
