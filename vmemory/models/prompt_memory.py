"""The memory of a model: it compresses the videos of each prompt and shortens the prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from vmemory.banks import MemoryConfig
from vmemory.models.adapter import Adapter, Clip, Inputs, check_copies
from vmemory.models.compress_video import KeptVideo, VideoTokens, compress_clip, compress_video
from vmemory.models.hooks import IN_MODEL
from vmemory.models.memories import GivenMemory
from vmemory.models.prompt import CompressedPrompt, compress_prompt
from vmemory.models.turn import Turn, cache_in, tokens_in


class PromptMemory:
    """The object in `model.__dict__` while a memory is attached; hooks and replaced methods call it.

    Attributes:
        model: The model.
        adapter: The adapter of the model's family.
        given: The memory; None = a memory made from `config` for each video's grid.
        config: The settings.
        enabled: If False, all calls pass unchanged.
        last_prompt: The token counts and sources of each video of the last prompt.
        undo: Functions of the model that remove the hooks and methods.
        handle: The handle that `attach` returned.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, memory: GivenMemory | None, config: MemoryConfig) -> None:
        self.model, self.adapter, self.given, self.config = model, adapter, memory, config
        self.enabled = config.enable_memory_bank
        self.last_prompt: list[VideoTokens] = []
        self.undo: list[Callable[[nn.Module], None]] = []
        self.handle: Any = None

    @property
    def memory(self) -> GivenMemory | None:
        """The memory in use: `given`, or its wrapper in the model (PEFT's `modules_to_save`)."""
        given = self.given
        if not isinstance(given, nn.Module) or self.model.__dict__.get(IN_MODEL) is not self:
            return given
        return self.model.vmemory if self.adapter.trainable_module(given) is given else given

    def moved(self, replica: nn.Module) -> None:
        """Attach the memory to a replica of the model in the same way."""
        other = copy.copy(self)
        other.model, other.adapter, other.last_prompt, other.undo = replica, copy.copy(self.adapter), [], []
        other.handle = type(self.handle)(other)
        replica.__dict__[IN_MODEL] = other

    def wants(self, inputs: Inputs) -> bool:
        """Return whether these inputs contain a video for the memory.

        Raises:
            ValueError: They do, but without ids, with a cache that is not empty, or with speech generation.
        """
        if not self.enabled or inputs.get(self.adapter.pixels) is None:
            return False
        if inputs.get("input_ids") is None:
            raise ValueError(f"input_ids: expected ids beside {self.adapter.pixels}, got none")
        name, cache = cache_in(inputs)
        if cache is not None:
            self.check_cache(name, cache)
        if self.adapter.generates_audio and inputs.get("output_hidden_states"):
            raise ValueError(
                "output_hidden_states: expected False with a memory, got True; speech is made from the hidden states "
                "of the whole prompt (return_audio=False)"
            )
        return True

    def check_cache(self, name: str, cache: object) -> None:
        """Raise ValueError if a cache is not empty."""
        held = tokens_in(cache)
        if held > 0:
            raise ValueError(
                f"{name}: expected an empty cache with a new video, got one of {held} "
                "tokens; vmemory.VideoSession takes frames in one after the other"
            )

    def compress_clip(self, clip: Clip) -> KeptVideo:
        """Compress one video, given as a whole."""
        return compress_clip(clip, self.config, self.memory)

    def compress_video(self, pieces: Iterator[Clip]) -> KeptVideo:
        """Compress one video, given piece by piece."""
        return compress_video(pieces, self.config, self.memory)

    def compress_prompt(self, inputs: Inputs, generating: bool) -> CompressedPrompt:
        """Return the shortened prompt with its compressed videos; the model is not changed."""
        return compress_prompt(self.model, self.adapter, inputs, self.config, self.memory, generating=generating)

    def shrink(self, inputs: Inputs, generating: bool) -> tuple[Inputs, Turn]:
        """Return the inputs for the model and the original prompt, and set the model's rope deltas."""
        new = compress_prompt(self.model, self.adapter, inputs, self.config, self.memory, generating=generating)
        self.record(new.videos)
        self.adapter.set_rope_deltas(self.model, new.rope_deltas)
        return new.inputs, new.turn

    def record(self, videos: list[KeptVideo]) -> None:
        """Store the token counts and sources of a prompt's videos."""
        self.last_prompt = [
            VideoTokens(k.source, k.grid, k.tokens_before, len(k.source) + (0 if k.tail is None else len(k.tail)))
            for k in videos
        ]

    def check_copies(self, inputs: Inputs) -> None:
        """Raise ValueError if beams or several answers would see another row's video."""
        check_copies(self.model, inputs)

    def continued(self, inputs: Inputs, turn: Turn) -> Inputs:
        """Return inputs of `generate` for a cache with a shortened prompt; its videos are not encoded again.

        Raises:
            ValueError: The inputs do not begin with this prompt, or contain a new video.
        """
        if inputs.get("input_ids") is None:
            raise ValueError("input_ids: expected ids beside a cache that holds a prompt with its videos, got none")
        known = {name: value for name, value in inputs.items() if name not in self.adapter.consumed}
        ids = (getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        held = tokens_in(cache_in(inputs)[1])
        new = turn.continued(known, held, [int(token) for token in ids if token is not None])
        self.adapter.set_rope_deltas(self.model, turn.offset)
        return new

    def following(self, inputs: Inputs, turn: Turn) -> Inputs:
        """Return inputs of `forward` for tokens after such a cache."""
        return turn.following(inputs, tokens_in(cache_in(inputs)[1]))
