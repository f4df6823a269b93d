"""A model for training, with its memory, out of any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vmemory._attach import attach, attached
from vmemory.banks import MemoryConfig
from vmemory.banks.config import ConfigLike
from vmemory.models.loading import load_model
from vmemory.train.budgeted_memory import BudgetedMemory
from vmemory.train.data_arguments import DataArguments
from vmemory.train.model_arguments import ModelArguments
from vmemory.train.parts import freeze, part_of, projectors
from vmemory.train.training_arguments import TrainingArguments
from vmemory.train.worldlm.recipe import SHIPPED


def load_model_with_memory_bank(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[Any, Any]:
    """Load a model, attach the memory that the arguments describe, and freeze what is not trained.

    A memory with weights has new ones, or those of the checkpoint if it was trained with one.

    Args:
        model_args: `model_name_or_path` is a folder or a hub id, of a model or of PEFT's adapters; or `worldlm`, the
            small model of the package.
        data_args: With `use_memory_bank` a memory is attached; `vmemory.attached(model)` is its handle.
        training_args: Stage, steps of the warm-up and seed.

    Returns:
        The model, and its processor (without torchvision: tokenizer, chat template and pixel statistics).

    Raises:
        ValueError: An argument does not fit.
        OSError: The checkpoint does not exist.
    """
    name = model_args.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path: expected a folder or the id of a model, got none")
    if name == "worldlm" and not Path(name).exists():
        name = str(SHIPPED)
    adapters = _adapters(name)
    base = name if adapters is None else adapters["base_model_name_or_path"]
    model, processor = load_model(base, dtype=model_args.dtype)
    frozen = training_args.stage == 1 and model_args.freeze_llm
    lora = model_args.lora_r > 0 or adapters is not None
    if lora and frozen:
        raise ValueError("stage: expected 2 with LoRA, which trains the language model, got 1")
    handle = None
    if data_args.use_memory_bank:
        config = memory_config(model_args, data_args)
        # what does not fit is told before the first step
        config.build(64, (16, 16), device="meta")
        budgeted = None
        if config.policy != "dual":
            low, high = data_args.memory_budget_range
            budgeted = BudgetedMemory(
                config, warmup_steps=training_args.memory_bank_warmup_steps,
                spread=(low, high), seed=training_args.seed,
            )  # fmt: skip
        handle = attach(model, budgeted, config)
    if adapters is None and handle is not None and hasattr(model, "vmemory"):
        _restore(model.vmemory, name)
    freeze(model, language=frozen, backbone=model_args.freeze_backbone)
    if adapters is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name, is_trainable=True)
    elif lora:
        model = _with_lora(model, model_args)
    return model, processor


def memory_config(model_args: ModelArguments, data_args: DataArguments) -> MemoryConfig:
    """Return the memory's settings, of `memory_bank_config` or else of the data arguments.

    Raises:
        ValueError: A setting does not fit, or the file holds none.
        OSError: The file does not exist.
    """
    if model_args.memory_bank_config is not None:
        return MemoryConfig.from_dict(_settings(model_args.memory_bank_config))
    policy = data_args.memory_policy or "hierarchical"
    settings: dict[str, Any] = {
        "memory_policy": policy,
        "memory_capacities": tuple(data_args.memory_capacities),
        "max_frames_before_compression": data_args.max_frames_before_compression,
    }
    if policy == "dual":
        if len(data_args.memory_capacities) != 2:
            got = data_args.memory_capacities
            raise ValueError(f"memory_capacities: expected two of a dual memory, working and episodic, got {got}")
        return MemoryConfig.from_dict(settings)
    settings["memory_reduced_sizes"] = tuple(data_args.memory_reduced_sizes)
    if policy == "hierarchical":
        tiers, intervals = len(data_args.memory_capacities), data_args.reverse_memory_sample_ratio
        if len(data_args.memory_reduced_sizes) != tiers:
            got = data_args.memory_reduced_sizes
            raise ValueError(f"memory_reduced_sizes: expected {tiers}, as many as memory_capacities, got {got}")
        if intervals is not None:
            if len(intervals) > tiers:
                raise ValueError(
                    f"reverse_memory_sample_ratio: expected null, or at most {tiers} numbers, as many as "
                    f"memory_capacities, got {intervals}"
                )
            settings["memory_intervals"] = tuple(intervals)
    return MemoryConfig.from_dict(settings)


def _settings(place: str) -> ConfigLike:
    import yaml
    from transformers import AutoConfig

    path = Path(place)
    if path.is_dir():
        config: ConfigLike = AutoConfig.from_pretrained(place)
        if not hasattr(config, "enable_memory_bank"):
            raise ValueError(f"memory_bank_config: expected a model trained with a memory, got {place}, without one")
        return config
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"memory_bank_config: {place}: not JSON or YAML ({_first_line(error)})") from None
    if not isinstance(read, dict):
        raise ValueError(f"memory_bank_config: expected settings by name in {place}, got {type(read).__name__}")
    return read


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def _found(name: str, file: str) -> Path | None:
    """Find a file of a checkpoint, in a folder or on the hub."""
    from transformers.utils import cached_file

    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _adapters(name: str) -> dict[str, Any] | None:
    path = _found(name, "adapter_config.json")
    return None if path is None else dict(json.loads(path.read_text(encoding="utf-8")))


def _restore(memory: Any, name: str) -> None:
    """Load the memory's weights where the checkpoint has some; those of other sizes are an error."""
    from safetensors import safe_open

    index = _found(name, "model.safetensors.index.json")
    files = {"model.safetensors"} if index is None else set(json.loads(index.read_text())["weight_map"].values())
    weights: dict[str, Any] = {}
    for file in sorted(files):
        path = _found(name, file)
        if path is None:
            continue
        with safe_open(path, "pt") as stored:
            names = [key for key in stored.keys() if part_of(key) == "memory"]  # noqa: SIM118  # it is no mapping
            weights |= {key.split("vmemory.", 1)[1]: stored.get_tensor(key) for key in names}
    if not weights:
        return
    try:
        memory.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"model_name_or_path: expected a memory of the same form in {name}, got another: "
            f"{' '.join(str(error).split())}"
        ) from None


def _with_lora(model: Any, model_args: ModelArguments) -> Any:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) == "language" and "lm_head" not in name
    }
    saved = projectors(model) + (["vmemory"] if attached(model) is not None and hasattr(model, "vmemory") else [])
    config = LoraConfig(
        r=model_args.lora_r, lora_alpha=model_args.lora_alpha, lora_dropout=model_args.lora_dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(sorted(linear))})", modules_to_save=saved,
    )  # fmt: skip
    return get_peft_model(model, config)
