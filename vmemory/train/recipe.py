"""Training out of a recipe: a YAML file, arguments of a command line, or both."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import transformers

from vmemory.data.online import OnlineVideoDataset, create_dataset
from vmemory.data.world import View, World, ask, world_item
from vmemory.train.data_arguments import DataArguments
from vmemory.train.loading import load_model_with_memory_bank
from vmemory.train.model_arguments import ModelArguments
from vmemory.train.picture import loss_picture
from vmemory.train.trainer import MemoryTrainer
from vmemory.train.training_arguments import TrainingArguments

_log = logging.getLogger(__name__)
_CLASSES: Any = (ModelArguments, DataArguments, TrainingArguments)


class Recipe(NamedTuple):
    """All arguments of a training."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments


def read_recipe(given: Sequence[str]) -> Recipe:
    """Read a recipe.

    Args:
        given: Words of a command line. The first one may name a YAML or JSON file with an argument a line; words behind
            it take precedence.

    Raises:
        ValueError: An unknown argument or a value that does not fit; the message names it.
        OSError: The file does not exist.
    """
    words = list(given)
    nothing: list[str] = []
    if words and not words[0].startswith("-"):
        read_words, nothing = _words_of(Path(words[0]))
        words = read_words + words[1:]
    parser = _Parser(_CLASSES, add_help=False, allow_abbrev=False)
    *read, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        known = [field.name for cls in _CLASSES for field in fields(cls)]
        close = difflib.get_close_matches(unknown[0].lstrip("-"), known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{unknown[0].lstrip('-')}: expected an argument of a recipe, got an unknown one{hint}")
    recipe = Recipe(*read)
    if "reverse_memory_sample_ratio" in nothing:
        recipe.data.reverse_memory_sample_ratio = None
    if recipe.data.group_by_length:
        recipe.training.train_sampling_strategy = "group_by_length"
    return recipe


class _Parser(transformers.HfArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        # "argument --max_steps/--max-steps: invalid int value"
        name, _, problem = message.removeprefix("argument --").partition(": ")
        raise ValueError(f"{name.partition('/')[0]}: {problem}")


def _words_of(path: Path) -> tuple[list[str], list[str]]:
    """Return a file's arguments as words of a command line, which turns `1e-4` into a number as YAML does not.

    The second list names arguments whose value is null. They keep their default, which is None but for one argument.
    """
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ValueError(f"{path}: {where}not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected an argument a line (name: value), got {type(read).__name__}")
    # arguments of other types that are switched on without a value, such as fsdp
    flags = {field.name for cls in _CLASSES for field in fields(cls) if field.metadata.get("const") is True}
    words: list[str] = []
    for name, value in read.items():
        if value is None:
            continue
        listed = value if isinstance(value, list) else [] if value is True and name in flags else [value]
        words += [f"--{name}", *(json.dumps(x) if isinstance(x, dict) else str(x) for x in listed)]
    return words, [name for name, value in read.items() if value is None]


def train(recipe: Recipe) -> MemoryTrainer:
    """Train a model by a recipe, and write it to `output_dir`.

    `output_dir` then holds the model with its memory, `trainer_state.json` with all lines of the log, `memory.json`
    with the peaks of memory, and `loss.png`.

    Raises:
        ValueError, OSError: An argument does not fit, or the data or the model cannot be read.
    """
    model_args, data_args, training_args = recipe
    resume = _checkpoint(training_args)
    transformers.set_seed(training_args.seed)
    model, processor = load_model_with_memory_bank(model_args, data_args, training_args)
    tokenizer = processor.tokenizer
    dataset = _dataset(data_args.data_path, data_args.world_items, "train", recipe, model, processor)
    if dataset is None:
        raise ValueError("data_path: expected data (or world_items) to train on, got none")
    validation = _dataset(data_args.eval_data_path, data_args.world_eval_items, "validation", recipe, model, processor)
    trainer = MemoryTrainer(model, training_args, tokenizer=tokenizer, train_dataset=dataset, eval_dataset=validation)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        last = last_checkpoint(training_args.output_dir)
        begun = f"goes on from {Path(last).name}" if last else "begins anew, for nothing was saved yet (save_steps)"
        done = trainer.state.global_step
        raise KeyboardInterrupt(f"interrupted after step {done}; --resume_from_checkpoint true {begun}") from None
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        _write_results(trainer, Path(str(trainer.args.output_dir)))
    left = len(trainer.skipped) + len(dataset.skipped) + (0 if validation is None else len(validation.skipped))
    if left:
        _log.warning("%d items were left out", left)
    return trainer


def _write_results(trainer: MemoryTrainer, folder: Path) -> None:
    steps = [step._asdict() for step in trainer.profiler.steps]
    peaks = {"host_peak": trainer.profiler.host_peak, "device_peak": trainer.profiler.device_peak, "steps": steps}
    (folder / "memory.json").write_text(json.dumps(peaks, indent=1))
    # a run may end before its first line
    if any("loss" in line for line in trainer.state.log_history):
        loss_picture(trainer.state.log_history, folder / "loss.png")


def _dataset(
    path: str | None, worlds: int, split: str, recipe: Recipe, model: Any, processor: Any
) -> OnlineVideoDataset | None:
    data, training = recipe.data, recipe.training
    if path is None and not worlds:
        return None
    items: Any = path or world_items(worlds, data.world_seconds, data.world_questions, data.world_seed, split)
    dataset = create_dataset(
        items, processor.tokenizer, processor, model=model, video_root=data.video_root,
        sampling_method=data.sampling_method, max_num_frame=data.max_num_frame,
        min_num_frame=min(data.min_num_frame, data.max_num_frame), max_seq_length=training.max_seq_length,
        frame_tokens=data.num_image_token, turns=data.turns, seed=training.seed,
    )  # fmt: skip
    _log.info("%s, %s: %s", data.ds_name if path else "world", split, dataset.summary())
    for item in dataset.skipped:
        _log.warning("left out: %s: %s", item.name, item.reason)
    return dataset


def world_items(count: int, seconds: int, questions: int, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """Make items of worlds that are drawn when they are read; all questions come at a world's last second."""
    items = []
    for number in range(seed, seed + count):
        world = World(number, seconds, split=split)
        rng = np.random.RandomState([number, 6])
        items.append(world_item(world, "", ask(View(world, np.arange(seconds)), rng, None, questions)))
    return items


def _checkpoint(training: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from.

    Raises:
        ValueError: One is asked for, and there is none.
    """
    asked = training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint, got {asked}")
        return asked
    found = last_checkpoint(training.output_dir)
    if found is None:
        raise ValueError(f"resume_from_checkpoint: expected a checkpoint in {training.output_dir}, got none")
    return found


def last_checkpoint(folder: str | None) -> str | None:
    """Return the newest whole checkpoint in a folder; one that was interrupted while it was written does not count."""
    if folder is None or not os.path.isdir(folder):
        return None
    # the state is what is written last
    whole = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in whole if path.name.rpartition("-")[2].isdigit()]
    return str(max(numbered)[1]) if numbered else None
