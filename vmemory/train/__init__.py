"""Training of video models, with and without a memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmemory.train.budgeted_memory import BudgetedMemory
    from vmemory.train.data_arguments import DataArguments
    from vmemory.train.loading import load_model_with_memory_bank
    from vmemory.train.model_arguments import ModelArguments
    from vmemory.train.picture import loss_picture
    from vmemory.train.profiler import MemoryProfiler
    from vmemory.train.recipe import Recipe, read_recipe, train
    from vmemory.train.trainer import MemoryTrainer
    from vmemory.train.training_arguments import TrainingArguments

# imported on first use, because transformers' Trainer takes seconds
_NAMES = {
    "BudgetedMemory": "budgeted_memory",
    "DataArguments": "data_arguments",
    "MemoryProfiler": "profiler",
    "MemoryTrainer": "trainer",
    "ModelArguments": "model_arguments",
    "Recipe": "recipe",
    "TrainingArguments": "training_arguments",
    "load_model_with_memory_bank": "loading",
    "loss_picture": "picture",
    "read_recipe": "recipe",
    "train": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'vmemory.train' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"vmemory.train.{_NAMES[name]}"), name)
    return found


__all__ = [
    "BudgetedMemory",
    "DataArguments",
    "MemoryProfiler",
    "MemoryTrainer",
    "ModelArguments",
    "Recipe",
    "TrainingArguments",
    "load_model_with_memory_bank",
    "loss_picture",
    "read_recipe",
    "train",
]
