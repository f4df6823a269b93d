"""A forward pre-hook and methods of the instance, which take the place of its class's until they are taken out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

HANDLE = "_vmemory"
_METHODS = "_vmemory_methods"


class Rewrites(Protocol):
    """What the hooks ask of the handle that lies in `model.__dict__`."""

    undo: list[Any]

    def wants(self, inputs: dict[str, Any]) -> bool: ...

    def shrunk(self, inputs: dict[str, Any], generating: bool) -> dict[str, Any]: ...


class Method:
    """A function of one model in the place of its method, for as long as a memory is in it.

    Copies and pickles go with their model: a bound function would be pickled as the attribute of its name, which is the
    method it replaces. Others may wrap it and still hold it when the memory is gone; then it is that method.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module, name: str) -> None:
        self.function, self.model, self.name = function, model, name
        self.former: Any = model.__dict__.get(name)

    def original(self) -> Any:
        """The method as it was."""
        return getattr(type(self.model), self.name).__get__(self.model) if self.former is None else self.former

    @property
    def __signature__(self) -> inspect.Signature:
        if self.former is None and not hasattr(type(self.model), self.name):
            return inspect.signature(partial(self.function, self.model))
        return inspect.signature(self.original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if HANDLE not in self.model.__dict__:
            return self.original()(*args, **kwargs)
        return self.function(self.model, *args, **kwargs)


def install_prompt_hook(model: nn.Module, handle: Rewrites) -> None:
    """Hook `forward` and `generate` of one instance.

    Everything is a function of the module that finds the handle through the model: copies of the model carry hooks of
    their own. The hook runs in `__call__`, above whatever `forward` accelerate, Liger or a compiler left there.
    """
    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    handle.undo.append(partial(_remove_hook, key=hook.id))
    install_methods(model, handle, {"generate": generate})


def install_methods(model: nn.Module, handle: Rewrites, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Give one instance methods, each a module-level function of the model and the method's arguments.

    `original` finds the method that one of them replaces.
    """
    methods = {name: Method(function, model, name) for name, function in functions.items()}
    model.__dict__[_METHODS] = methods
    model.__dict__.update(methods)
    handle.undo.append(_restore_methods)


def original(model: nn.Module, name: str) -> Any:
    """A method as it was before `install_methods`."""
    method: Method = model.__dict__[_METHODS][name]
    return method.original()


def _restore_methods(model: nn.Module) -> None:
    methods: dict[str, Method] = model.__dict__.pop(_METHODS)
    for name, method in methods.items():
        if model.__dict__.get(name) is not method:
            continue
        if method.former is None:
            del model.__dict__[name]
        else:
            model.__dict__[name] = method.former


def _remove_hook(model: nn.Module, key: int) -> None:
    model._forward_pre_hooks.pop(key)
    model._forward_pre_hooks_with_kwargs.pop(key)


def before_forward(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """The forward pre-hook."""
    handle: Rewrites = model.__dict__[HANDLE]
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        inputs = {**dict(zip(names, args, strict=False)), **inputs}
    if not handle.wants(inputs):
        return None
    return (), handle.shrunk(inputs, generating=False)


def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """`generate` with a prompt shrunk beforehand; the caller gets back the prompt that was given."""
    handle: Rewrites = self.__dict__[HANDLE]
    former = original(self, "generate")
    if inputs is not None:
        kwargs["input_ids"] = inputs
    if not handle.wants(kwargs):
        return former(*args, **kwargs)
    ids = kwargs["input_ids"]
    new = handle.shrunk(kwargs, generating=True)
    length = new["input_ids"].shape[1]
    new |= _lengths(self, args, new, ids.shape[1] - length)
    out = former(*args, **new)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    prompt = ids.repeat_interleave(len(sequences) // len(ids), 0).to(sequences.device)
    whole = torch.cat([prompt, sequences[:, length:]], 1)
    if isinstance(out, torch.Tensor):
        return whole
    out.sequences = whole
    return out


def _lengths(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dropped: int) -> dict[str, int]:
    """`max_length` and `min_length` for a prompt without `dropped` of its tokens: both count the caller's prompt."""
    config = args[0] if args else kwargs.get("generation_config")

    def setting(name: str) -> int | None:
        found = [kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)]
        return next((value for value in found if value is not None), None)

    lengths = {}
    for name, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(name)
        # a number of new tokens takes precedence
        if value and setting(new_tokens) is None:
            lengths[name] = max(value - dropped, 0)
    return lengths
