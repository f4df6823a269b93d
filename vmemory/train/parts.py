"""Parts of a video model: tower, projector, language model, memory."""

from __future__ import annotations

from typing import Literal

from torch import nn

Part = Literal["backbone", "projector", "language", "memory"]


def part_of(name: str) -> Part:
    """Return the part that a parameter belongs to, from its dotted name in a model of a supported family."""
    words = name.split(".")
    if "vmemory" in words:
        return "memory"
    if "language_model" in words or "lm_head" in words:
        return "language"
    if any("projector" in word or "merger" in word or word == "image_newline" for word in words):
        return "projector"
    return "backbone"


def projectors(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules of the projector."""
    found: list[str] = []
    for name, _ in model.named_modules():
        if name and part_of(name) == "projector" and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def freeze(model: nn.Module, *, language: bool, backbone: bool) -> dict[Part, int]:
    """Freeze parts of a model; projector and memory are always trained.

    Returns:
        Weights that are trained, by part.

    Raises:
        ValueError: Nothing is left to train.
    """
    trained: dict[Part, int] = {}
    for name, weight in model.named_parameters():
        part = part_of(name)
        weight.requires_grad_(not ((language and part == "language") or (backbone and part == "backbone")))
        if weight.requires_grad:
            trained[part] = trained.get(part, 0) + weight.numel()
    if not trained:
        raise ValueError("freeze_llm, freeze_backbone: expected something left to train, got a model without projector")
    return trained
