"""Training with a memory in the loop, compared at equal steps with training without, on the world.

python -m benchmarks.training FOLDER --out benchmarks/results/training.json
python -m benchmarks.training FOLDER --cost          step time and memory of each way to train, each in a process

FOLDER holds a model of the world. All ways begin with its weights and see the same worlds and questions in one order.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

import vmemory
from vmemory.data.world import View, World, ask
from vmemory.models.loading import load_model
from vmemory.train import MemoryTrainer, read_recipe, train

MERGING = [
    "--use_memory_bank", "--memory_policy", "merging", "--memory_reduced_sizes", "4",
    "--memory_capacities", "{entries}", "--memory_budget_range", "0.5", "2",
]  # fmt: skip
# what is different in each way to train; {entries} is a quarter of the frames
WAYS = {
    "without memory": [],
    "short prompts": ["--max_num_frame", "{entries}"],
    "memory": [*MERGING, "--memory_bank_loss_weight", "0"],
    "memory, self-distillation": MERGING,
    "dual memory": [
        "--use_memory_bank", "--memory_policy", "dual", "--memory_capacities", "4", "8",
        "--memory_bank_loss_weight", "0",
    ],
}  # fmt: skip


class Clock(TrainerCallback):
    """Measures processor seconds a step, and the memory that the process held before the first one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        status = Path("/proc/self/status").read_text().splitlines()
        self.before = 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def recipe(folder: str, way: str, seconds: int, steps: int, seed: int, out: str) -> Any:
    words = [word.format(entries=seconds // 4) for word in WAYS[way]]
    common = {
        "model_name_or_path": folder, "output_dir": out, "world_items": 8 * steps, "world_seconds": seconds,
        "world_questions": 1, "world_seed": 2_000_000 + 100_000 * seed, "num_image_token": 4, "stage": 2,
        "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 2e-4, "warmup_steps": steps // 10,
        "memory_bank_warmup_steps": steps // 4, "logging_steps": 5, "seed": seed, "save_strategy": "no",
    }  # fmt: skip
    given = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    return read_recipe([*given, "--use_cpu", "--disable_tqdm", "true", "--grad_checkpoint", "false", *words])


def run(folder: str, way: str, seconds: int, steps: int, seed: int) -> tuple[MemoryTrainer, Clock]:
    clock = Clock()
    added = MemoryTrainer.train

    def timed(self: MemoryTrainer, **given: Any) -> Any:
        self.add_callback(clock)
        return added(self, **given)

    with tempfile.TemporaryDirectory() as out:
        MemoryTrainer.train = timed  # type: ignore[method-assign]
        try:
            trainer = train(recipe(folder, way, seconds, steps, seed, out))
        finally:
            MemoryTrainer.train = added  # type: ignore[method-assign]
    return trainer, clock


def accuracy(model: Any, tokenizer: Any, seconds: int, worlds: int, memory: Any = None) -> dict[str, Any]:
    """Return the shares of right answers about now and about the past (means of kinds), on worlds of the test split.

    None = the memory that is attached.
    """
    right = defaultdict(list)
    for seed in range(worlds):
        world = World(seed, seconds, split="test")
        session = vmemory.VideoSession(model, tokenizer, config=memory, fps=1.0, frame_tokens=4)
        session.push(torch.from_numpy(world.render()), time=[float(second) for second in range(seconds)])
        questions = ask(View(world, np.arange(seconds)), np.random.RandomState([seed, 7]), None, 16)
        answers = session.ask_all([question.text for question in questions], max_new_tokens=8)
        for question, answer in zip(questions, answers, strict=True):
            right[question.kind].append(answer.strip() == question.answer)
    shares = {kind: sum(found) / len(found) for kind, found in sorted(right.items())}
    means = {when: float(np.mean([s for k, s in shares.items() if k.startswith(when)])) for when in ("now", "past")}
    return {**means, "questions": sum(map(len, right.values())), "kinds": shares}


def scores(model: Any, tokenizer: Any, seconds: int, worlds: int) -> dict[str, Any]:
    """Ask a model with all frames and with memories of a quarter of the tokens; a dual memory as it was trained."""
    model = model.eval()
    handle = vmemory.attached(model)
    found = {}
    if handle is not None and handle.config.policy == "dual":
        found["dual"] = accuracy(model, tokenizer, seconds, worlds)
    if handle is not None:
        handle.detach()
    for name, policy, entries in (
        ("all frames", "recent", seconds), ("merging", "merging", seconds // 4), ("uniform", "uniform", seconds // 4),
    ):  # fmt: skip
        settings = {"memory_policy": policy, "memory_capacities": [entries], "memory_reduced_sizes": [4]}
        found[name] = accuracy(model, tokenizer, seconds, worlds, settings)
    return found


def compare(args: argparse.Namespace) -> None:
    _, processor = load_model(args.folder)
    tokenizer = processor.tokenizer
    facts = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "steps": args.steps, "seconds": args.seconds,
        "test_worlds": args.worlds, "seeds": args.seeds,
    }  # fmt: skip
    model, _ = load_model(args.folder, dtype="float32")
    result: dict[str, Any] = {"facts": facts, "before": scores(model, tokenizer, args.seconds, args.worlds), "runs": []}
    print("before", short(result["before"]), flush=True)
    for seed in range(args.seeds):
        for way in args.ways:
            trainer, clock = run(args.folder, way, args.seconds, args.steps, seed)
            alpha = [w.item() for n, w in trainer.model.named_parameters() if n.endswith("alpha")]
            found = scores(trainer.model, tokenizer, args.seconds, args.worlds)
            losses = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
            entry = {"way": way, "seed": seed, "cpu_seconds_a_step": float(np.median(clock.seconds)), "losses": losses}
            result["runs"].append({**entry, **({"alpha": alpha[0]} if alpha else {}), "scores": found})
            print(seed, way, f"{entry['cpu_seconds_a_step']:.2f} CPU s a step", short(found), flush=True)
            args.out.write_text(json.dumps(result, indent=1))


def cost(args: argparse.Namespace) -> None:
    """Measure each way in a process of its own, at 200 frames."""
    for way in args.ways:
        command = [sys.executable, "-m", "benchmarks.training", args.folder, "--one", way, "--steps", str(args.steps)]
        subprocess.run([*command, "--seconds", str(args.seconds)], check=True)


def one(args: argparse.Namespace) -> None:
    trainer, clock = run(args.folder, args.one, args.seconds, args.steps, 0)
    # the first steps load libraries
    steps = trainer.profiler.steps[2:]
    peak, before = max(step.host_peak for step in steps), clock.before
    print(
        f"{args.one:28} {np.median(clock.seconds[2:]):6.2f} CPU s a step, peak {peak >> 20} MiB, "
        f"{peak - before >> 20} MiB above what was there before",
        flush=True,
    )


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(': ')[1] if names else platform.processor()}, {torch.get_num_threads()} thread"


def short(found: dict[str, Any]) -> str:
    return "; ".join(f"{name} now {x['now']:.3f} past {x['past']:.3f}" for name, x in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--worlds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    one(args) if args.one else cost(args) if args.cost else compare(args)


if __name__ == "__main__":
    main()
