"""One call puts a memory into a Hugging Face video model, another takes it out; the model's code stays as it is."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import nn

import vmemory.integrations
from vmemory.banks import MemoryConfig
from vmemory.models.adapter import Adapter, Clip, Inputs, check_copies
from vmemory.models.hook import HANDLE
from vmemory.models.registry import find_adapter, supported_types
from vmemory.models.remember import Kept, Provenance, remember
from vmemory.models.rewrite import Rewritten, rewrite
from vmemory.models.turn import Turn, cache_in, tokens_in

_ABSENT = "(absent)"


class Handle:
    """A memory in a model; as a context manager it detaches at the end.

    Attributes:
        model: The model it is in.
        adapter: What is known of the model's family.
        given: What reduces videos; None = a memory that `config` makes for each video's grid.
        config: The settings.
        enabled: Off lets everything pass untouched.
        kept: What became of each video of the last prompt: sources, and tokens before and after.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, memory: Any, config: MemoryConfig) -> None:
        self.model, self.adapter, self.config = model, adapter, config
        self.given = memory
        self.enabled = config.enable_memory_bank
        self.kept: list[Provenance] = []
        self.undo: list[Callable[[nn.Module], None]] = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        if attached(self.model) is self:
            self.detach()

    @property
    def memory(self) -> Any:
        """What reduces videos now: `given`, or what others (PEFT's `modules_to_save`) put around it in the model."""
        inside = attached(self.model) is self and self.adapter.learned(self.given) is self.given
        return self.model.vmemory if inside and self.given is not None else self.given

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model as it was, for as long as the block lasts."""
        before, self.enabled = self.enabled, False
        try:
            yield self.model
        finally:
            self.enabled = before

    def detach(self) -> nn.Module:
        """Take the memory out; nothing of it stays in the model, which is returned.

        Raises:
            ValueError: It is not in the model any more.
        """
        if attached(self.model) is not self:
            raise ValueError("handle: expected a memory that is still in its model, got one that was detached")
        while self.undo:
            self.undo.pop()(self.model)
        del self.model.__dict__[HANDLE]
        return self.model

    def moved(self, replica: nn.Module) -> None:
        """Put the memory into a replica of the model the way it is in the model."""
        other = copy.copy(self)
        other.model, other.adapter, other.kept, other.undo = replica, copy.copy(self.adapter), [], []
        replica.__dict__[HANDLE] = other

    def remember(self, pieces: Iterator[Clip]) -> Kept:
        """What the memory makes of one video, given piece by piece."""
        return remember(pieces, self.config, self.memory)

    def record(self, kept: list[Kept]) -> None:
        """Keep what became of the videos."""
        self.kept = [k.provenance() for k in kept]

    def wants(self, inputs: Inputs) -> bool:
        """Whether these inputs hold a video for the memory.

        Raises:
            ValueError: They do, without ids, with a cache that holds something, or with speech to come.
        """
        if not self.enabled or inputs.get(self.adapter.pixels) is None:
            return False
        if inputs.get("input_ids") is None:
            raise ValueError(f"input_ids: expected ids beside {self.adapter.pixels}, got none")
        self.check_cache(*cache_in(inputs))
        if self.adapter.speaks and inputs.get("output_hidden_states"):
            raise ValueError(
                "output_hidden_states: expected False with a memory, got True; speech is made from the hidden states "
                "of the whole prompt (return_audio=False)"
            )
        return True

    def check_cache(self, name: str, cache: Any) -> None:
        """Raise ValueError where a cache already holds something."""
        held = tokens_in(cache)
        if held > 0:
            raise ValueError(
                f"{name}: expected an empty cache with a new video, got one of {held} "
                "tokens; vmemory.VideoSession takes frames in one after the other"
            )

    def rewritten(self, inputs: Inputs, generating: bool) -> Rewritten:
        """A prompt with the videos that the memory made of its own; see `rewrite`."""
        chunk = self.config.memory_chunk_frames
        return rewrite(self.model, self.adapter, inputs, self.remember, chunk=chunk, generating=generating)

    def shrunk(self, inputs: Inputs, generating: bool) -> tuple[Inputs, Turn]:
        """The inputs for the model, beside what was given; the model is told where its prompt ends."""
        new = self.rewritten(inputs, generating)
        self.record(new.kept)
        self.adapter.located(self.model, new.rope_deltas)
        return new.inputs, new.turn

    def check_copies(self, inputs: Inputs) -> None:
        """Raise ValueError where beams or several answers would see other videos than their row's."""
        check_copies(self.model, inputs)

    def continued(self, inputs: Inputs, turn: Turn) -> Inputs:
        """Inputs of `generate` on top of a cache whose prompt has shrunk; videos given once more are in it already.

        Raises:
            ValueError: They do not begin with that prompt, or hold a new video.
        """
        if inputs.get("input_ids") is None:
            raise ValueError("input_ids: expected ids beside a cache that holds a prompt with its videos, got none")
        known = {name: value for name, value in inputs.items() if name not in self.adapter.consumed}
        ids = (getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        held = tokens_in(cache_in(inputs)[1])
        new = turn.continued(known, held, [int(token) for token in ids if token is not None])
        self.adapter.located(self.model, turn.offset)
        return new

    def following(self, inputs: Inputs, turn: Turn) -> Inputs:
        """Inputs of `forward`, the tokens that follow such a cache."""
        return turn.following(inputs, tokens_in(cache_in(inputs)[1]))


def attached(model: nn.Module) -> Handle | None:
    """The memory in a model, if there is one."""
    handle: Handle | None = base_of(model).__dict__.get(HANDLE)
    return handle


def base_of(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and PEFT, or the model."""
    compiled = model._modules.get("_orig_mod")
    if compiled is not None:
        return base_of(compiled)
    inner = getattr(model, "get_base_model", None)
    found: nn.Module = inner() if callable(inner) else model
    return found


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model's family.

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


def attach(model: nn.Module, memory: Any = None, config: Any = None) -> Handle:
    """Put a memory into a model: from now on its videos go through it, in `forward` and in `generate`.

    Only this instance changes: a forward pre-hook and a `generate` of its own (remote code: its methods that prepare a
    prompt; CLIP: `encode_video`), `model.vmemory` where the memory has weights, which train or evaluate as the model
    does, and the settings in `model.config`. `Handle.detach` takes all of it back. Where `generate` itself is sharded
    (`register_fsdp_forward_method`) the memory comes first.

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
    handle = _handle(model, adapter, memory, config)
    learned = adapter.learned(handle.given)
    if learned is not None:
        if hasattr(model, "vmemory"):
            raise ValueError("model: expected no attribute 'vmemory', where the memory's weights go, got one")
        model.add_module("vmemory", learned.train(model.training))
        handle.undo.append(_remove_memory)
    _write_config(model, handle)
    adapter.install(model, handle)
    model.__dict__[HANDLE] = handle
    return handle


def compress_inputs(
    model: nn.Module, inputs: Mapping[str, Any], memory: Any = None, config: Any = None, *, generating: bool = True
) -> Inputs:
    """What `attach` does to a prompt, for people with their own loop; the model is not changed.

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
    handle = attached(model)
    if handle is None or memory is not None or config is not None:
        handle = _handle(model, adapter_of(model), memory, config)
    if inputs.get(handle.adapter.pixels) is None or inputs.get("input_ids") is None:
        raise ValueError(f"inputs: expected {handle.adapter.pixels} and input_ids, got {', '.join(inputs) or 'none'}")
    return handle.rewritten(dict(inputs), generating).inputs


def _handle(model: Any, adapter: Adapter, memory: Any, config: Any) -> Handle:
    settings = MemoryConfig.of(getattr(model, "config", None) if config is None else config)
    if isinstance(memory, str):
        settings = MemoryConfig.of({**settings.written(), "memory_policy": memory})
    return Handle(model, adapter, adapter.take(model, memory, settings), settings)


def _remove_memory(model: nn.Module) -> None:
    del model._modules["vmemory"]


def _write_config(model: Any, handle: Handle) -> None:
    written = handle.config.written() if hasattr(model, "config") else {}
    before = {name: model.config.__dict__.get(name, _ABSENT) for name in written}
    handle.undo.append(partial(_restore_config, before=before))
    for name, value in written.items():
        setattr(model.config, name, value)


def _restore_config(model: Any, before: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, str) and value == _ABSENT:
            delattr(model.config, name)
        else:
            setattr(model.config, name, value)
