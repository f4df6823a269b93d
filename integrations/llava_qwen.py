"""LLaVA-NeXT's `LlavaQwenForCausalLM`: one sentinel per video, which the model expands to tokens and newlines."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vmemory.banks import DualMemory, MemoryConfig
from vmemory.models.adapter import Clip
from vmemory.models.compress_video import KeptVideo, compress_clip
from vmemory.models.geometry import GeometryFusion
from vmemory.models.hooks import original
from vmemory.models.registry import register_adapter
from vmemory.models.remote_code import RemoteCodeAdapter, arguments_of, prompt_memory_of

# attribute of a tensor of kept tokens: their places in the flattened T·H·W grid, and the side of the grid
_SOURCE = "vmemory_source"


def memory_of(prompts: Any) -> Any:
    """Return the memory without a geometry module around it."""
    return prompts.memory.memory if isinstance(prompts.given, GeometryFusion) else prompts.memory


def prepare_inputs_labels_for_multimodal(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own method."""
    name = "prepare_inputs_labels_for_multimodal"
    prompts, prepare = prompt_memory_of(model), original(model, name)
    given = arguments_of(model, name, args, kwargs)
    kinds = given["modalities"] or ()
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not prompts.enabled or given["images"] is None or given["input_ids"].shape[1] == 1 or "video" not in kinds:
        return prepare(*args, **kwargs)
    prompts.check_cache("past_key_values", given["past_key_values"])
    prompts.adapter.kept = []
    made = prepare(*args, **kwargs)
    prompts.record(prompts.adapter.kept)
    prompts.adapter.kept = []
    return made


def encode_images(model: Any, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return projected tokens `[T, n, D]`, `memory_chunk_frames` frames at a time, with geometry if the memory adds it.

    Further arguments, which some forks pass, refer to all images, which are then encoded at once.
    """
    prompts, encode = prompt_memory_of(model), original(model, "encode_images")
    if not prompts.enabled:
        plain: Tensor = encode(images, *args, **kwargs)
        return plain
    chunk = None if args or kwargs else prompts.config.memory_chunk_frames
    chunk = chunk or max(len(images), 1)
    made = []
    for frames in images.split(chunk):
        tokens = encode(frames, *args, **kwargs)
        made.append(prompts.memory(tokens, frames) if isinstance(prompts.given, GeometryFusion) else tokens)
    return made[0] if len(made) == 1 else torch.cat(made)


def get_2dPool(model: Any, image_feature: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pool a video's tokens `[T, n, D]`; a memory that keeps every token works before it, any other after.

    If the memory returns fewer tokens, the result is `[1, N, D]`.
    """
    prompts, pool = prompt_memory_of(model), original(model, "get_2dPool")
    if not prompts.enabled:
        plain: Tensor = pool(image_feature, *args, **kwargs)
        return plain
    if getattr(memory_of(prompts), "one_to_one", False):
        whole = _remembered(prompts, image_feature).tokens.view_as(image_feature)
        fused: Tensor = pool(whole, *args, **kwargs)
        return fused
    pooled: Tensor = pool(image_feature, *args, **kwargs)
    kept = _remembered(prompts, pooled)
    if len(kept.tokens) == pooled.shape[0] * pooled.shape[1]:
        return kept.tokens.view_as(pooled)
    tokens = kept.tokens[None]
    setattr(tokens, _SOURCE, (kept.source, kept.grid[1]))
    return tokens


def _remembered(prompts: Any, tokens: Tensor) -> KeptVideo:
    T, n, D = tokens.shape
    side = math.isqrt(n)
    kept = compress_clip(Clip(tokens.reshape(T, side, side, D), D), prompts.config, memory_of(prompts))
    prompts.adapter.kept.append(kept)
    return kept


def add_token_per_grid(model: Any, image_feature: Tensor) -> Tensor:
    """Add a newline after each row of a frame with remaining tokens, to tokens `[N, D]`."""
    source, side = getattr(image_feature, _SOURCE, (None, 1))
    if source is None:
        plain: Tensor = original(model, "add_token_per_grid")(image_feature)
        return plain
    return _with_newlines(image_feature[0], model.model.image_newline, source // side)


def add_token_per_frame(model: Any, image_feature: Tensor) -> Tensor:
    """Add a newline after each frame with remaining tokens, to tokens `[1, N, D]`."""
    source, side = getattr(image_feature, _SOURCE, (None, 1))
    if source is None:
        plain: Tensor = original(model, "add_token_per_frame")(image_feature)
        return plain
    return _with_newlines(image_feature[0], model.model.image_newline, source // side**2)[None]


def _with_newlines(tokens: Tensor, newline: Tensor, group: Tensor) -> Tensor:
    """Insert a newline `[D]` into tokens `[N, D]` after the last token of each group in `group [N]`, ascending."""
    N = len(group)
    last = torch.cat([group[1:] != group[:-1], group.new_ones(min(N, 1), dtype=torch.bool)])
    ends = last.nonzero().flatten()
    # positions of tokens and newlines: every previous group adds one position
    at = torch.arange(N, device=group.device) + last.cumsum(0) - last.long()
    order = torch.cat([at, at[ends] + 1]).argsort()
    return torch.cat([tokens, newline.to(tokens).expand(len(ends), -1)])[order]


@register_adapter("llava_qwen", detect=lambda model: LlavaQwen.fits(model))
class LlavaQwen(RemoteCodeAdapter):
    """Adapter without placeholders: each video has its own tokens, and each row of a batch its own videos."""

    pixels = "images"
    methods = ("get_model", "get_vision_tower")
    functions: ClassVar = {
        function.__name__: function
        for function in (
            prepare_inputs_labels_for_multimodal, encode_images, get_2dPool, add_token_per_grid, add_token_per_frame
        )
    }  # fmt: skip

    def __init__(self) -> None:
        self.kept: list[KeptVideo] = []

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if getattr(model.config, "add_faster_video", False):
            raise ValueError(
                "model: expected add_faster_video off in its config, got it on; it takes a whole video, pooled twice"
            )

    def resolve_memory(self, model: nn.Module, memory: Any, settings: MemoryConfig) -> Any:
        if not isinstance(memory, GeometryFusion):
            return super().resolve_memory(model, memory, settings)
        if memory.memory is None and settings.memory_policy == DualMemory.policy:
            raise ValueError("memory: expected a DualMemory inside GeometryFusion for the policy 'dual', got none")
        super().resolve_memory(model, memory.memory, settings)
        return memory

    def hidden_size(self, model: nn.Module) -> int:
        return int(model.config.hidden_size)  # type: ignore[arg-type, union-attr]
