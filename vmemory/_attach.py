"""Attach a memory to a Hugging Face video model and detach it, without changing the model's code."""

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
from vmemory.models.memories import GivenMemory, MemoryLike
from vmemory.models.prompt_memory import PromptMemory
from vmemory.models.registry import find_adapter, supported_types

_ABSENT = "(absent)"


class MemoryHandle:
    """The handle of an attached memory; as a context manager it detaches the memory at the end."""

    def __init__(self, prompts: PromptMemory) -> None:
        self._prompts = prompts

    def __enter__(self) -> MemoryHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        if attached(self.model) is self:
            self.detach()

    @property
    def model(self) -> nn.Module:
        """The model with the memory."""
        return self._prompts.model

    @property
    def config(self) -> MemoryConfig:
        """The settings."""
        return self._prompts.config

    @property
    def memory(self) -> GivenMemory | None:
        """The memory, a function that makes one, or None if `config` makes one for each video.

        A memory with weights is `model.vmemory`, including a wrapper around it (PEFT's `modules_to_save`).
        """
        return self._prompts.memory

    @property
    def last_prompt(self) -> list[VideoTokens]:
        """For each video of the last prompt: `tokens_before`, `tokens_after`, and the sources of the kept tokens."""
        return self._prompts.last_prompt

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Disable the memory within a context, which gets the model."""
        before, self._prompts.enabled = self._prompts.enabled, False
        try:
            yield self.model
        finally:
            self._prompts.enabled = before

    def detach(self) -> nn.Module:
        """Remove the memory and all hooks from the model, and return the model.

        Raises:
            ValueError: The memory is not attached any more.
        """
        model = self.model
        if attached(model) is not self:
            raise ValueError("handle: expected a memory that is still in its model, got one that was detached")
        while self._prompts.undo:
            self._prompts.undo.pop()(model)
        del model.__dict__[IN_MODEL]
        return model


def attached(model: nn.Module) -> MemoryHandle | None:
    """Return the handle of the memory attached to a model, or None."""
    prompts: PromptMemory | None = base_of(model).__dict__.get(IN_MODEL)
    return None if prompts is None else prompts.handle


def base_of(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of `torch.compile` and PEFT, or the model itself."""
    compiled = model._modules.get("_orig_mod")
    if compiled is not None:
        return base_of(compiled)
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found


def adapter_of(model: nn.Module) -> Adapter:
    """Return the adapter of a model's family.

    Raises:
        TypeError: `model` is not a module.
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
    """Attach a memory to a model; `forward` and `generate` then compress the videos of their prompts.

    Only this instance changes. It gets a forward pre-hook and its own `generate` (remote code: its methods that prepare
    a prompt; CLIP: `encode_video`), the settings in `model.config` and, for a memory with weights, the submodule
    `model.vmemory`. `MemoryHandle.detach` removes all of it. Attach before `register_fsdp_forward_method` is applied to
    `generate`.

    Args:
        model: A model of a family in `integrations/`, also inside the wrappers of PEFT and `torch.compile`.
        memory: A policy's name (`"merging"`); a memory, or any object whose `compress(clip, time, mask=…)` returns
            `MemoryTokens` (a bank supports videos of its own grid only); or a function that makes one from `dim`,
            `grid`, `key_dim`, `device` and `dtype`. None = a memory made from `config`. An untrained `DualMemory`
            changes the model's output unless it has `residual=True`, which `config` sets. LLaVA-Qwen also accepts a
            `GeometryFusion`; CLIP accepts a `TempMe` or a frame compressor, and without memory and settings it pools
            all frames.
        config: A `MemoryConfig`, a dict, or an object with these attributes; None = `model.config`.

    Returns:
        A `MemoryHandle`; as a context manager it detaches at its end.

    Raises:
        TypeError: `model` is not a module, or `memory` none of the above.
        ValueError: The family or a setting is unknown, a memory is already attached, or transformers is too old.
            Nothing has changed.
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
    inputs: Mapping[str, object],
    memory: MemoryLike | None = None,
    config: ConfigLike | None = None,
    *,
    generating: bool = True,
) -> Inputs:
    """Compress the videos of a prompt as `attach` does, for your own loop; the model is not changed.

    Args:
        model: As in `attach`. Its attached memory is used if neither `memory` nor `config` is given.
        inputs: Inputs of `forward` or `generate`: pixels, `input_ids [B, L]`, …
        memory, config: As in `attach`.
        generating: Whether for `generate`, which needs padding on the left; otherwise for `forward`.

    Returns:
        Inputs without pixels, with `mm_encoder_outputs` and matching ids, masks, labels and positions.

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
