"""One call puts a memory into a Hugging Face video model, another takes it out; the model's code stays as it is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import nn

import vmemory.integrations
from vmemory.banks.config import ConfigLike, MemoryConfig
from vmemory.models.adapter import Adapter, Inputs
from vmemory.models.compress_video import VideoTokens
from vmemory.models.hooks import IN_MODEL
from vmemory.models.memories import MemoryLike
from vmemory.models.prompt_memory import PromptMemory
from vmemory.models.registry import find_adapter, supported_types

_ABSENT = "(absent)"


class MemoryHandle:
    """A memory in a model, as `attach` returns it; as a context manager it detaches at the end."""

    def __init__(self, prompts: PromptMemory) -> None:
        self._prompts = prompts

    def __enter__(self) -> MemoryHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        if attached(self.model) is self:
            self.detach()

    @property
    def model(self) -> nn.Module:
        """The model that the memory is in."""
        return self._prompts.model

    @property
    def config(self) -> MemoryConfig:
        """The settings."""
        return self._prompts.config

    @property
    def memory(self) -> Any:
        """What reduces videos: the memory, a function that makes one, or None where `config` makes one a video.

        A memory with weights is `model.vmemory`, with whatever others (PEFT's `modules_to_save`) put around it there.
        """
        return self._prompts.memory

    @property
    def last_prompt(self) -> list[VideoTokens]:
        """For each video of the last prompt: `tokens_before` and `tokens_after`, and where the tokens come from."""
        return self._prompts.last_prompt

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Let everything pass untouched for as long as the block lasts; it gets the model."""
        before, self._prompts.enabled = self._prompts.enabled, False
        try:
            yield self.model
        finally:
            self._prompts.enabled = before

    def detach(self) -> nn.Module:
        """Take the memory out of the model and return the model; nothing of the memory stays in it.

        Raises:
            ValueError: It is not in the model any more.
        """
        model = self.model
        if attached(model) is not self:
            raise ValueError("handle: expected a memory that is still in its model, got one that was detached")
        while self._prompts.undo:
            self._prompts.undo.pop()(model)
        del model.__dict__[IN_MODEL]
        return model


def attached(model: nn.Module) -> MemoryHandle | None:
    """Return the handle of the memory in a model, or None."""
    prompts: PromptMemory | None = base_of(model).__dict__.get(IN_MODEL)
    return None if prompts is None else prompts.handle


def base_of(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of `torch.compile` and PEFT, or the model."""
    compiled = model._modules.get("_orig_mod")
    if compiled is not None:
        return base_of(compiled)
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found


def adapter_of(model: nn.Module) -> Adapter:
    """Return the adapter of a model's family.

    Raises:
        TypeError: Not a module.
        ValueError: No family fits, or the installed transformers is too old for it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _load_families()
    adapter = find_adapter(model)
    if adapter is not None:
        adapter.check(model)
        return adapter
    kind = getattr(getattr(model, "config", None), "model_type", None)
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and find_adapter(base_of(inner)) is not None:
        raise ValueError(f"model: expected the model inside the wrapper, model.module, got {type(model).__name__}")
    if hasattr(model, "thinker"):
        raise ValueError(
            f"model: expected the part that reads the prompt, model.thinker, got {type(model).__name__} ({kind!r}); "
            "speech is not supported with a memory"
        )
    raise ValueError(
        f"model: expected one of {', '.join(supported_types())}, got {type(model).__name__} of type {kind!r}; "
        "vmemory.register_adapter makes further families known"
    )


@cache
def _load_families() -> None:
    for module in pkgutil.iter_modules(vmemory.integrations.__path__):
        importlib.import_module(f"vmemory.integrations.{module.name}")


def attach(model: nn.Module, memory: MemoryLike | None = None, config: ConfigLike | None = None) -> MemoryHandle:
    """Put a memory into a model: from now on its videos go through it, in `forward` and in `generate`.

    Only this instance changes: a forward pre-hook and a `generate` of its own (remote code: its methods that prepare a
    prompt; CLIP: `encode_video`), `model.vmemory` where the memory has weights, which train or evaluate as the model
    does, and the settings in `model.config`. `MemoryHandle.detach` takes all of it back. Where `generate` itself is
    sharded (`register_fsdp_forward_method`) the memory comes first.

    Args:
        model: A model of a family in `integrations/`, also inside the wrappers of PEFT and `torch.compile`.
        memory: A policy's name (`"merging"`), a memory (with `compress(clip, time, valid=…)` giving `MemoryTokens`; a
            bank fits videos of its own grid alone), or a function that makes one from `dim`, `grid`, `key_dim`,
            `device` and `dtype`. None = what `config` says. An untrained `DualMemory` changes the model unless it is
            made with `residual=True`, as by `config`. LLaVA-Qwen also takes a `GeometryFusion`, CLIP a `TempMe` or a
            frame compressor, and with neither memory nor settings it pools all frames.
        config: A `MemoryConfig`, a dict, or an object with such attributes; None = `model.config`.

    Returns:
        A handle: `detach()`, `disabled()`; as a context manager it detaches at its end.

    Raises:
        TypeError: `model` is no module, `memory` nothing of the above.
        ValueError: An unknown family or setting, a memory already there, or a transformers that is too old; nothing has
            changed then.
    """
    if isinstance(model, nn.Module):
        model = base_of(model)
        if attached(model) is not None:
            raise ValueError("model: expected one without a memory, got one that has one; detach it first")
    adapter = adapter_of(model)
    prompts = _prompt_memory(model, adapter, memory, config)
    trained = adapter.trainable_module(prompts.given)
    if trained is not None:
        if hasattr(model, "vmemory"):
            raise ValueError("model: expected no attribute 'vmemory', where the memory's weights go, got one")
        model.add_module("vmemory", trained.train(model.training))
        prompts.undo.append(_remove_memory)
    _write_config(model, prompts)
    adapter.install(model, prompts)
    prompts.handle = MemoryHandle(prompts)
    model.__dict__[IN_MODEL] = prompts
    return prompts.handle


def compress_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    memory: MemoryLike | None = None,
    config: ConfigLike | None = None,
    *,
    generating: bool = True,
) -> Inputs:
    """Do to a prompt what `attach` does, for people with their own loop; the model is not changed.

    Args:
        model: As in `attach`; a memory in it is what compresses where neither `memory` nor `config` is given.
        inputs: Of `forward` or `generate`: pixels, `input_ids [B, L]`, …
        memory, config: As in `attach`.
        generating: For `generate`, which wants padding on the left; else for `forward`.

    Returns:
        Inputs without pixels, with `mm_encoder_outputs`, ids, masks, labels and positions that fit each other.

    Raises:
        ValueError: As in `attach`, or no video in the inputs.
    """
    model = base_of(model)
    prompts: PromptMemory | None = model.__dict__.get(IN_MODEL)
    if prompts is None or memory is not None or config is not None:
        prompts = _prompt_memory(model, adapter_of(model), memory, config)
    if inputs.get(prompts.adapter.pixels) is None or inputs.get("input_ids") is None:
        raise ValueError(f"inputs: expected {prompts.adapter.pixels} and input_ids, got {', '.join(inputs) or 'none'}")
    return prompts.compress_prompt(dict(inputs), generating).inputs


def _prompt_memory(model: Any, adapter: Adapter, memory: MemoryLike | None, config: ConfigLike | None) -> PromptMemory:
    named = {"memory_policy": memory} if isinstance(memory, str) else {}
    settings = MemoryConfig.from_dict(getattr(model, "config", None) if config is None else config, **named)
    return PromptMemory(model, adapter, adapter.resolve_memory(model, memory, settings), settings)


def _remove_memory(model: nn.Module) -> None:
    del model._modules["vmemory"]


def _write_config(model: Any, prompts: PromptMemory) -> None:
    written = prompts.config.to_dict() if hasattr(model, "config") else {}
    before = {name: model.config.__dict__.get(name, _ABSENT) for name in written}
    prompts.undo.append(partial(_restore_config, before=before))
    for name, value in written.items():
        setattr(model.config, name, value)


def _restore_config(model: Any, before: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, str) and value == _ABSENT:
            delattr(model.config, name)
        else:
            setattr(model.config, name, value)
