"""Adapters of families that assemble the prompt inside the model, by replaced methods of the instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

from torch import nn

from vmemory.models.adapter import Adapter, Inputs
from vmemory.models.hooks import IN_MODEL, Shrinks, install_methods, original


class RemoteCodeAdapter(Adapter):
    """Adapter of remote code, which is recognised by its methods; some of them are replaced in one instance.

    Attributes:
        methods: Names of methods that identify the family, in addition to `functions`.
        functions: Replacements, as functions of the model and the method's arguments, by the method's name.
        optional: Names in `functions` that older releases lack; they are not replaced there.
        added: Further functions, under names that the model does not have.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    optional: ClassVar[tuple[str, ...]] = ()
    added: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Return whether the model has all methods of the family."""
        return not cls.missing(model)

    @classmethod
    def missing(cls, model: nn.Module) -> list[str]:
        """Return the methods of the family that the model lacks."""
        wanted = dict.fromkeys((*cls.methods, *cls.functions))
        return [name for name in wanted if name not in cls.optional and not callable(getattr(model, name, None))]

    def check(self, model: nn.Module) -> None:
        missing = self.missing(model)
        if missing:
            raise ValueError(f"model: expected the methods {', '.join(missing)}, got {type(model).__name__} without")
        taken = [name for name in self.added if hasattr(model, name)]
        if taken:
            raise ValueError(f"model: expected no {', '.join(taken)} of its own, got {type(model).__name__} with")

    def install(self, model: nn.Module, memory: Shrinks) -> None:
        there = {name: function for name, function in self.functions.items() if hasattr(model, name)}
        install_methods(model, memory, {**there, **self.added})

    def encode(self, model: nn.Module, inputs: Inputs) -> NoReturn:
        raise ValueError(
            f"model: expected one whose forward takes mm_encoder_outputs, got {type(model).__name__}, which puts its "
            "prompt together inside; attach reduces videos there"
        )


def arguments_of(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a replaced method by name, None for omitted ones."""
    signature = inspect.signature(original(model, name))
    given = dict.fromkeys(signature.parameters)
    return {**given, **signature.bind(*args, **kwargs).arguments}


def prompt_memory_of(model: nn.Module) -> Any:
    """Return the `PromptMemory` that `attach` put into the model."""
    return model.__dict__[IN_MODEL]
