"""CLIP: one embedding per video, with fewer frames before the tower, fewer tokens in it, or a memory after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmemory.banks import MemoryConfig
from vmemory.compress import TempMe
from vmemory.compress.tempme_tower import vision_tower
from vmemory.models.adapter import Clip, Inputs, dtype_of
from vmemory.models.compress_video import KeptVideo
from vmemory.models.registry import register_adapter
from vmemory.models.remote_code import RemoteCodeAdapter, prompt_memory_of
from vmemory.ops._checks import check_device, check_tensor, shape_of


class AllFrames:
    """A placeholder for a memory that keeps all frames."""


def encode_video(model: Any, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return one embedding per video, of norm 1: the mean of its frames' directions. Differentiable.

    Args:
        model: CLIP, with or without an enabled memory.
        pixel_values: `[B, T, 3, H, W]`, as the model's processor makes each frame; T at least 1.
        mask: `[B, T]` bool, True where a frame exists; other frames are not read. None = all.

    Returns:
        `[B, D]` in the dtype of the model's embeddings; zeros for a video without a frame.

    Raises:
        TypeError, ValueError: An argument does not fit, or does not fit the compressor; the message names it.

    Source: mean pooling of CLIP4Clip (arXiv 2104.08860).
    """
    check_tensor("pixel_values", pixel_values, "[B, T, 3, H, W]")
    B, T = pixel_values.shape[:2]
    if T < 1:
        raise ValueError(f"pixel_values: expected at least 1 frame, got shape {shape_of(pixel_values)}")
    if mask is not None:
        check_tensor("mask", mask, "[B, T]")
        if mask.dtype != torch.bool or mask.shape != (B, T):
            raise ValueError(f"mask: expected bool [{B}, {T}], got {mask.dtype} of shape {shape_of(mask)}")
        check_device("mask", mask, "pixel_values", pixel_values)
        pixel_values = pixel_values.masked_fill(~mask[:, :, None, None, None], 0)
    prompts = prompt_memory_of(model)
    if not prompts.enabled or isinstance(prompts.given, AllFrames):
        return _mean(_embedded(model, pixel_values), mask)
    if isinstance(prompts.given, TempMe):
        merging = prompts.given.inside(model, getattr(model, "vmemory", prompts.given.positions))
        return _mean(merging(pixel_values, mask).frames, mask)
    if _reduces_frames(prompts.given):
        made = prompts.memory(pixel_values, mask)
        return _mean(_embedded(model, made.frames), made.mask)
    exists = torch.ones(B, T, dtype=torch.bool, device=pixel_values.device) if mask is None else mask
    kept = _remembered(model, prompts, pixel_values, exists)
    prompts.record([k for k in kept if k is not None])
    D = model.config.projection_dim
    zeros = torch.zeros(D, dtype=dtype_of(model), device=pixel_values.device)
    return torch.stack([zeros if k is None else _mean(k.tokens[None])[0] for k in kept])


def _embedded(model: Any, frames: Tensor) -> Tensor:
    """Embed frames `[B, T, 3, H, W]` to `[B, T, D]`, `memory_chunk_frames` at a time."""
    flat = frames.flatten(0, 1)
    chunk = prompt_memory_of(model).config.memory_chunk_frames or len(flat)
    made = [model.get_image_features(part.contiguous()).pooler_output for part in flat.split(max(chunk, 1))]
    embedded: Tensor = torch.cat(made) if len(made) > 1 else made[0]
    return embedded.unflatten(0, frames.shape[:2])


def _mean(frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """Reduce embeddings `[B, T, D]` to one of norm 1 per video."""
    wide = torch.promote_types(frames.dtype, torch.float32)
    directions = F.normalize(frames.to(wide), dim=-1)
    if mask is None:
        return F.normalize(directions.mean(1), dim=-1).to(frames.dtype)
    there = mask[..., None]
    total = directions.masked_fill(~there, 0).sum(1) / there.sum(1).clamp(min=1)
    return F.normalize(total, dim=-1).to(frames.dtype)


def _remembered(model: Any, prompts: Any, pixel_values: Tensor, exists: Tensor) -> list[KeptVideo | None]:
    """Compress each video's embeddings with the memory; None for a video without frames."""
    chunk = prompts.config.memory_chunk_frames
    whole = _embedded(model, pixel_values) if chunk is None else None
    kept: list[KeptVideo | None] = []
    for video, there in enumerate(exists):
        held = int(there.sum())
        if held == 0:
            kept.append(None)
        elif whole is not None:
            kept.append(prompts.compress_clip(_clip(whole[video][there])))
        else:
            kept.append(prompts.compress_video(_pieces(model, pixel_values[video][there], chunk)))
    return kept


def _pieces(model: Any, frames: Tensor, chunk: int) -> Iterator[Clip]:
    for part in frames.split(chunk):
        yield _clip(_embedded(model, part[None])[0])


def _clip(embeddings: Tensor) -> Clip:
    return Clip(embeddings[:, None, None], embeddings.shape[-1])


def _reduces_frames(memory: Any) -> bool:
    return isinstance(memory, nn.Module) and callable(getattr(memory, "count", None))


@register_adapter("clip")
class ClipVideos(RemoteCodeAdapter):
    """Add `encode_video` to CLIP; `get_image_features` is unchanged, and a memory gets frames of 1 × 1 tokens."""

    pixels = "pixel_values"
    methods = ("get_image_features",)
    added: ClassVar = {"encode_video": encode_video}

    def hidden_size(self, model: Any) -> int:
        return int(model.config.projection_dim)

    def resolve_memory(self, model: nn.Module, memory: Any, settings: MemoryConfig) -> Any:
        if memory is None and settings == MemoryConfig():
            return AllFrames()
        if isinstance(memory, TempMe):
            own = vision_tower(model)[0]
            if own is not memory.tower or memory.projection is None:
                raise ValueError("memory: expected a TempMe of the model's own tower, TempMe(model)")
            return memory
        return memory if _reduces_frames(memory) else super().resolve_memory(model, memory, settings)

    def trainable_module(self, memory: Any) -> nn.Module | None:
        return super().trainable_module(memory.positions if isinstance(memory, TempMe) else memory)

    def encode(self, model: nn.Module, inputs: Inputs) -> NoReturn:
        raise ValueError("model: expected one with a prompt that shrinks, got CLIP; see its encode_video")
