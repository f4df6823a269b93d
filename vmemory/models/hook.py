"""A forward pre-hook and a `generate` of the instance: both shrink a prompt before the unchanged model sees it."""

from __future__ import annotations

import inspect
import types
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

HANDLE = "_vmemory"


class Rewrites(Protocol):
    """What the hooks ask of the handle that lies in `model.__dict__`."""

    undo: list[Any]

    def wants(self, inputs: dict[str, Any]) -> bool: ...

    def shrunk(self, inputs: dict[str, Any], generating: bool) -> dict[str, Any]: ...


def install_prompt_hook(model: nn.Module, handle: Rewrites) -> None:
    """Hook `forward` and `generate` of one instance.

    Everything is a function of the module that finds the handle through the model: copies of the model carry hooks of
    their own. The hook runs in `__call__`, above whatever `forward` accelerate, Liger or a compiler left there.
    """
    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    handle.undo.append(partial(_remove_hook, key=hook.id))
    former = model.__dict__.get("generate")
    model.__dict__["_vmemory_generate"] = former
    model.__dict__["generate"] = types.MethodType(generate, model)
    handle.undo.append(_restore_generate)


def _remove_hook(model: nn.Module, key: int) -> None:
    model._forward_pre_hooks.pop(key)
    model._forward_pre_hooks_with_kwargs.pop(key)


def _restore_generate(model: nn.Module) -> None:
    former = model.__dict__.pop("_vmemory_generate")
    if former is None:
        del model.__dict__["generate"]
    else:
        model.__dict__["generate"] = former


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
    former = self.__dict__["_vmemory_generate"]
    original = type(self).generate.__get__(self) if former is None else former
    if inputs is not None:
        kwargs["input_ids"] = inputs
    if not handle.wants(kwargs):
        return original(*args, **kwargs)
    ids = kwargs["input_ids"]
    new = handle.shrunk(kwargs, generating=True)
    length = new["input_ids"].shape[1]
    out = original(*args, **new)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    prompt = ids.repeat_interleave(len(sequences) // len(ids), 0).to(sequences.device)
    whole = torch.cat([prompt, sequences[:, length:]], 1)
    if isinstance(out, torch.Tensor):
        return whole
    out.sequences = whole
    return out
