"""Find the adapter of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from vmemory.models.adapter import Adapter

_A = TypeVar("_A", bound=type[Adapter])
_BY_TYPE: dict[str, type[Adapter]] = {}
_BY_METHODS: list[tuple[Callable[[nn.Module], bool], type[Adapter]]] = []


def register_adapter(*model_types: str, detect: Callable[[nn.Module], bool] | None = None) -> Callable[[_A], _A]:
    """Register an `Adapter` class (decorator).

    Args:
        model_types: `model.config.model_type` of supported models; a later registration replaces an earlier one.
        detect: Returns whether a model with an unregistered type, for example of remote code, is supported.

    Raises:
        ValueError: Neither argument is given.
    """
    if not model_types and detect is None:
        raise ValueError("model_types: expected at least one, or detect, got neither")

    def enter(adapter: _A) -> _A:
        _BY_TYPE.update(dict.fromkeys(model_types, adapter))
        if detect is not None:
            _BY_METHODS.append((detect, adapter))
        return adapter

    return enter


def find_adapter(model: nn.Module) -> Adapter | None:
    """Return the adapter of a model; `detect` takes precedence over the config's `model_type`."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for detect, adapter in reversed(_BY_METHODS):
        if detect(model):
            return adapter()
    return _BY_TYPE[kind]() if kind in _BY_TYPE else None


def supported_types() -> list[str]:
    """Return every registered `model_type`."""
    return sorted(_BY_TYPE)
