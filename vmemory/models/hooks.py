"""Install and remove a forward pre-hook and replacements of methods on one model instance."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmemory.models.turn import Turn, cache_in, mark, turn_in

# the attribute of a model with its `PromptMemory`
IN_MODEL = "_vmemory"
_METHODS = "_vmemory_methods"
_REPLICATE = "_replicate_for_data_parallel"


class Shrinks(Protocol):
    """The methods of a `PromptMemory` that the hooks call."""

    undo: list[Any]
    config: Any

    def wants(self, inputs: dict[str, Any]) -> bool: ...

    def shrink(self, inputs: dict[str, Any], generating: bool) -> tuple[dict[str, Any], Turn]: ...

    def check_copies(self, inputs: dict[str, Any]) -> None: ...

    def continued(self, inputs: dict[str, Any], turn: Turn) -> dict[str, Any]: ...

    def following(self, inputs: dict[str, Any], turn: Turn) -> dict[str, Any]: ...

    def moved(self, replica: nn.Module) -> None: ...


class Method:
    """A function that replaces a method of one model while a memory is attached.

    It is copied and pickled with its model. A bound function would be pickled as the attribute of its name, which is
    the method it replaces. A wrapper may still hold it after the memory is detached; it then calls the original method.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module, name: str) -> None:
        self.function, self.model, self.name = function, model, name
        self.former: Any = model.__dict__.get(name)

    def original(self) -> Any:
        """Return the original method."""
        return getattr(type(self.model), self.name).__get__(self.model) if self.former is None else self.former

    def moved(self, model: nn.Module) -> Method:
        """Return the replacement for a replica of the model."""
        other = copy.copy(self)
        other.model = model
        return other

    @property
    def __signature__(self) -> inspect.Signature:
        if self.former is None and not hasattr(type(self.model), self.name):
            return inspect.signature(partial(self.function, self.model))
        return inspect.signature(self.original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if IN_MODEL not in self.model.__dict__:
            return self.original()(*args, **kwargs)
        return self.function(self.model, *args, **kwargs)


def install_prompt_hook(model: nn.Module, memory: Shrinks) -> None:
    """Install hooks on `forward` and `generate` of one instance.

    The hooks are module-level functions that find the memory through the model, so copies of the model have hooks of
    their own. The hook runs in `__call__`, before any `forward` that accelerate, Liger or a compiler installed.
    """
    before = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    after = model.register_forward_hook(after_forward, with_kwargs=True)
    memory.undo.append(partial(_remove_hooks, before=before.id, after=after.id))
    install_methods(model, memory, {"generate": generate})


def install_methods(model: nn.Module, memory: Shrinks, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Replace methods of one instance by module-level functions of the model and the method's arguments.

    `original` returns the method that a function replaces.
    """
    _put(
        model, {name: Method(function, model, name) for name, function in {**functions, _REPLICATE: replicate}.items()}
    )
    memory.undo.append(_restore_methods)


def _put(model: nn.Module, methods: dict[str, Method]) -> None:
    model.__dict__[_METHODS] = methods
    model.__dict__.update(methods)


def replicate(model: nn.Module) -> nn.Module:
    """Return a replica for `torch.nn.parallel.replicate`, with replaced methods of its own."""
    replica: nn.Module = original(model, _REPLICATE)()
    former: dict[str, Method] = model.__dict__[_METHODS]
    _put(replica, {name: method.moved(replica) for name, method in former.items()})
    model.__dict__[IN_MODEL].moved(replica)
    return replica


def original(model: nn.Module, name: str) -> Any:
    """Return a method as it was before `install_methods`."""
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


def _remove_hooks(model: nn.Module, before: int, after: int) -> None:
    model._forward_pre_hooks.pop(before)
    model._forward_pre_hooks_with_kwargs.pop(before)
    model._forward_hooks.pop(after)
    model._forward_hooks_with_kwargs.pop(after)


class _Calls(threading.local):
    """Data that the pre-hook of a call passes to its post-hook, by the model's `id`, per thread."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[Turn, Tensor | None]] = {}


_CALLS = _Calls()


def before_forward(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """Shrink the prompt before `forward` (forward pre-hook)."""
    _CALLS.open.pop(id(model), None)
    memory: Shrinks = model.__dict__[IN_MODEL]
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        inputs = {**dict(zip(names, args, strict=False)), **inputs}
    if memory.wants(inputs):
        new, turn = memory.shrink(inputs, generating=False)
        place = None
        if memory.config.memory_full_logits:
            place, asked = turn.column, inputs.get("logits_to_keep", 0)
            chooses = "logits_to_keep" in inspect.signature(type(model).forward).parameters
            if chooses and (not isinstance(asked, int) or asked > 0):
                new["logits_to_keep"], place = _logits_wanted(turn.column, asked)
        _CALLS.open[id(model)] = turn, place
        return (), new
    before = turn_in(cache_in(inputs)[1])
    return None if before is None else ((), memory.following(inputs, before))


def after_forward(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
    """Return logits at the caller's tokens, and mark the cache with the caller's prompt (forward hook)."""
    call = _CALLS.open.pop(id(model), None)
    if call is None:
        return None
    turn, place = call
    if isinstance(output, tuple):
        for cache in (x for x in output if hasattr(x, "get_seq_length")):
            mark(cache, turn)
        # in a tuple the logits are the first tensor of three dimensions
        at = next((i for i, x in enumerate(output) if isinstance(x, Tensor) and x.dim() == 3), None)
        if place is None or at is None:
            return None
        return (*output[:at], _gathered(output[at], place), *output[at + 1 :])
    mark(cache_in(output)[1], turn)
    # fused losses return no logits
    if place is not None and output.get("logits") is not None:
        output["logits"] = _gathered(output["logits"], place)
    return output


def _logits_wanted(column: Tensor, asked: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits that the model must compute, and `[B, n]` their indices for the requested ones."""
    wanted = column[:, -asked:] if isinstance(asked, int) else column[:, asked.to(column.device)]
    columns, place = wanted.unique(return_inverse=True)
    return columns, place


def _gathered(logits: Tensor, place: Tensor) -> Tensor:
    """Gather logits `[B, n', V]` to `[B, n, V]`."""
    return logits[torch.arange(len(place), device=logits.device)[:, None], place.to(logits.device)]


@torch.no_grad()
def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """Run `generate` with a shrunk prompt, and return the caller's prompt in front of the answer.

    As in the model's own `generate`, there are no gradients, also in the vision tower.
    """
    memory: Shrinks = self.__dict__[IN_MODEL]
    former = original(self, "generate")
    if inputs is not None:
        kwargs["input_ids"] = inputs
    cache = cache_in(kwargs)[1]
    turn = turn_in(cache)
    if turn is not None:
        new = memory.continued(kwargs, turn)
    elif memory.wants(kwargs):
        new, turn = memory.shrink(kwargs, generating=True)
        several = ("num_beams", "num_return_sequences")
        if max(generation_setting(self, _given(args, kwargs), name) or 1 for name in several) > 1:
            memory.check_copies(new)
    else:
        return former(*args, **kwargs)
    ids = kwargs["input_ids"]
    length = new["input_ids"].shape[1]
    new |= _lengths(self, args, new, ids.shape[1] - length)
    out = former(*args, **new)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    times = len(sequences) // len(ids)
    if cache is None and not isinstance(out, torch.Tensor):
        cache = cache_in(out)[1]
    if turn_in(cache) is None:
        mark(cache, turn.repeated(times))
    prompt = ids.repeat_interleave(times, 0).to(sequences.device)
    whole = torch.cat([prompt, sequences[:, length:]], 1)
    if isinstance(out, torch.Tensor):
        return whole
    out.sequences = whole
    return out


def _lengths(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dropped: int) -> dict[str, int]:
    """Return `max_length` and `min_length`, which count the caller's prompt, for a prompt shorter by `dropped`."""
    given, lengths = _given(args, kwargs), {}
    for name, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = generation_setting(model, given, name)
        # `max_new_tokens` takes precedence
        if value and generation_setting(model, given, new_tokens) is None:
            lengths[name] = max(value - dropped, 0)
    return lengths


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"generation_config": args[0], **kwargs} if args else kwargs


def generation_setting(model: Any, given: Mapping[str, Any], name: str) -> Any:
    """Return a setting of `generate`: from its arguments, their `generation_config`, or the model's; or None."""
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))
    found = [given.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in found if value is not None), None)
