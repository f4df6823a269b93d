"""VideoLLaMA3's original remote code, `Videollama3Qwen2ForCausalLM`, hooked where it drops tokens itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vmemory.models.adapter import Clip
from vmemory.models.compress_video import KeptVideo
from vmemory.models.frame_text import dead_spans
from vmemory.models.hooks import original
from vmemory.models.registry import register_adapter
from vmemory.models.remote_code import RemoteCodeAdapter, arguments_of, prompt_memory_of


class Visual(NamedTuple):
    """A picture or video in the tokens of a prompt, from index `first` on."""

    first: int
    grid: tuple[int, int, int]
    video: bool

    @property
    def tokens(self) -> int:
        T, H, W = self.grid
        return T * H * W


@dataclass
class Call:
    """Data of one prompt between the replaced methods.

    Attributes:
        visuals: Pictures and videos in the order of their tokens.
        own: Whether the model also drops tokens by pixel difference.
        here: `[n]` int64, tokens with a placeholder; None = all. Training truncates long prompts.
    """

    visuals: list[Visual]
    own: bool
    here: Tensor | None = None


def visuals_of(grid_sizes: Tensor, merge_sizes: Tensor, modals: Sequence[str] | None) -> list[Visual]:
    """Return the pictures and videos in the tower's output; pixels of text-only samples (`"text"`) do not count."""
    found, first = [], 0
    for place, ((t, h, w), m) in enumerate(zip(grid_sizes.tolist(), merge_sizes.tolist(), strict=True)):
        modal = ("video" if t > 1 else "image") if modals is None else modals[place]
        if modal != "text":
            found.append(Visual(first, (t, h // m, w // m), modal == "video"))
            first += found[-1].tokens
    return found


def prepare_inputs_labels_for_multimodal(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own method so that it takes the branch that drops tokens."""
    name = "prepare_inputs_labels_for_multimodal"
    prompts, prepare = prompt_memory_of(model), original(model, name)
    given = arguments_of(model, name, args, kwargs)
    ids, modals = given["input_ids"], given["modals"]
    silent = not prompts.enabled or given["pixel_values"] is None or ids.shape[1] == 1
    if silent or "video" not in (modals or ()):
        return prepare(*args, **kwargs)
    prompts.check_cache("past_key_values", given["past_key_values"])
    if ids.shape[0] != 1:
        raise ValueError(
            f"input_ids: expected one row [1, L], into which several prompts are packed, got {list(ids.shape)}; this "
            "model's prompts shrink in rows of one"
        )
    own = bool(model.config.use_token_compression)
    prompts.adapter.call = Call(visuals_of(given["grid_sizes"], given["merge_sizes"], modals), own)
    model.config.use_token_compression = True
    try:
        return prepare(*args, **kwargs)
    finally:
        model.config.use_token_compression = own
        prompts.adapter.call = None


def encode_images(model: Any, pixel_values: Tensor, grid_sizes: Tensor, merge_sizes: Tensor) -> Tensor:
    """Call the model's own method on `memory_chunk_frames` frames of a video at a time.

    Frames are independent in this tower, except in its eager attention, which adds a mask of 0 and 1 to the scores.

    Raises:
        ValueError: The tower has eager attention, and the video has more than one piece.
    """
    prompts, encode = prompt_memory_of(model), original(model, "encode_images")
    chunk = prompts.config.memory_chunk_frames
    if chunk is None or not prompts.enabled:
        tokens: Tensor = encode(pixel_values, grid_sizes, merge_sizes)
        return tokens
    pieces = sum(-(-t // chunk) for t in grid_sizes[:, 0].tolist())
    if pieces > 1 and _sees_all_frames(model):
        raise ValueError(
            f"memory_chunk_frames: expected None, got {chunk} for a vision encoder with eager attention, in which "
            "frames see each other; load it with attn_implementation sdpa or flash_attention_2"
        )
    made = []
    rows = pixel_values.split(grid_sizes.prod(-1).tolist())
    for place, (t, h, w) in enumerate(grid_sizes.tolist()):
        for first in range(0, t, chunk):
            frames = min(chunk, t - first)
            piece = rows[place][first * h * w : (first + frames) * h * w]
            made.append(encode(piece, grid_sizes.new_tensor([[frames, h, w]]), merge_sizes[place : place + 1]))
    return torch.cat(made)


def _sees_all_frames(model: Any) -> bool:
    find = getattr(model, "get_vision_encoder", None)
    parts = find().modules() if callable(find) else ()
    return any(getattr(getattr(part, "config", None), "_attn_implementation", None) == "eager" for part in parts)


def _get_compression_mask(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the model's own mask if it drops tokens anyway, otherwise a mask of all tokens."""
    mask: Tensor = original(model, "_get_compression_mask")(*args, **kwargs)
    call = prompt_memory_of(model).adapter.call
    return mask if call is None or call.own else torch.ones_like(mask)


def _maybe_truncate_visual_tokens(model: Any, features: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own method, and record which tokens stay."""
    truncate, call = original(model, "_maybe_truncate_visual_tokens"), prompt_memory_of(model).adapter.call
    if call is None:
        return truncate(features, mask, *args, **kwargs)
    call.here, mask = truncate(torch.arange(len(features), device=features.device), mask, *args, **kwargs)
    return features[call.here], mask


def _compress_visual_tokens(
    model: Any,
    compression_mask: Tensor,
    mm_features: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compress features `[N, D]` and the matching prompt tensors `[L]` with the memory."""
    prompts = prompt_memory_of(model)
    call: Call | None = prompts.adapter.call
    if call is None:
        compress = original(model, "_compress_visual_tokens")
        made: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None] = compress(
            compression_mask, mm_features, input_ids, attention_mask, position_ids, labels
        )
        return made
    total = sum(visual.tokens for visual in call.visuals)
    here = torch.arange(total, device=mm_features.device) if call.here is None else call.here
    places = (input_ids == model.config.image_token_index).nonzero().flatten()
    if len(places) != len(here):
        raise ValueError(f"input_ids: expected {len(here)} placeholders for the visual tokens, got {len(places)}")
    features, valid = mm_features, compression_mask
    if len(here) < total:
        features = mm_features.new_zeros(total, mm_features.shape[1]).index_copy(0, here, mm_features)
        valid = compression_mask.new_zeros(total).index_copy(0, here, compression_mask)

    kept, tokens, held = [], [], torch.zeros_like(valid)
    for visual in call.visuals:
        span = slice(visual.first, visual.first + visual.tokens)
        if visual.video:
            k = prompts.compress_clip(_clip(features[span], visual, valid[span]))
            held[visual.first + k.source] = True
            kept.append(k)
            tokens.append(k.tokens)
        else:
            held[span] = valid[span]
            tokens.append(features[span][valid[span]])
    prompts.record(kept)

    keep = torch.ones_like(input_ids, dtype=torch.bool)
    keep[places] = held[here]
    for visual in call.visuals:
        if visual.video:
            mine = places[(here >= visual.first) & (here < visual.first + visual.tokens)]
            for start, stop in dead_spans(input_ids, keep, mine, visual.grid[0]):
                keep[start:stop] = False
    if bool(keep.all()):
        return torch.cat(tokens), input_ids, attention_mask, position_ids, labels
    mask, targets = (None if x is None else x[keep] for x in (attention_mask, labels))
    return torch.cat(tokens), input_ids[keep], mask, _renumbered(position_ids, keep), targets


def _clip(tokens: Tensor, visual: Visual, valid: Tensor | None = None, time: Tensor | None = None) -> Clip:
    T, H, W = visual.grid
    whole = valid is None or bool(valid.all())
    exists = None if whole or valid is None else valid.view(T, H, W)
    return Clip(tokens.reshape(T, H, W, -1), tokens.shape[-1], exists, time=time)


def _renumbered(position_ids: Tensor | None, keep: Tensor) -> Tensor | None:
    """Renumber positions `[L]` of packed prompts, each from 0, without removed tokens."""
    if position_ids is None:
        return None
    prompt = (position_ids == 0).cumsum(0)[keep]
    return torch.arange(len(prompt), device=prompt.device) - torch.searchsorted(prompt, prompt)


def encode_images_with_memory(
    model: Any,
    pixel_values: Tensor,
    grid_sizes: Tensor,
    merge_sizes: Tensor,
    modals: Sequence[str] | None = None,
    timestamps: Any = None,
) -> Tensor:
    """Return visual tokens `[N, D]` like `encode_images`, with the videos compressed by the memory.

    `MemoryHandle.last_prompt` has the sources of the tokens; `get_memory_bank` then holds the last video.

    Args:
        model: A model with an attached memory.
        pixel_values, grid_sizes, merge_sizes: Arguments of `encode_images`.
        modals: `"video"`, `"image"` or `"text"` for each; None = `"video"` if it has several frames.
        timestamps: Seconds of the frames of all videos, concatenated; None = unknown.

    Raises:
        ValueError: Times do not fit the frames or do not increase within a video.
    """
    prompts = prompt_memory_of(model)
    features = model.encode_images(pixel_values, grid_sizes, merge_sizes)
    visuals = visuals_of(grid_sizes, merge_sizes, modals)
    frames = [visual.grid[0] for visual in visuals if visual.video]
    times: Iterator[Tensor | None] = iter([None] * len(frames))
    if timestamps is not None:
        seconds = torch.as_tensor(timestamps, dtype=torch.float64)
        if seconds.shape != (sum(frames),):
            raise ValueError(f"timestamps: expected [{sum(frames)}] seconds, got shape {list(seconds.shape)}")
        times = iter(seconds.split(frames))
    tokens: list[Tensor] = []
    kept: list[KeptVideo] = []
    for visual in visuals:
        own = features[visual.first : visual.first + visual.tokens]
        if not (visual.video and prompts.enabled):
            tokens.append(own)
            continue
        clip = _clip(own, visual, time=next(times))
        kept.append(prompts.compress_clip(clip))
        tokens.append(kept[-1].tokens)
        prompts.adapter.bank = _holding(prompts, clip)
    prompts.record(kept)
    return torch.cat(tokens) if tokens else features


def _holding(prompts: Any, clip: Clip) -> Any:
    """Return a bank with the video pushed into it, or None if the memory is not a bank."""
    (H, W), C = clip.frames.shape[1:3], clip.frames.shape[3]
    like = {"key_dim": clip.key_dim, "device": clip.frames.device, "dtype": clip.frames.dtype}
    bank = prompts.memory
    if bank is None:
        bank = prompts.config.build(C, (H, W), **like)
    elif not hasattr(bank, "compress"):
        bank = bank(dim=C, grid=(H, W), **like)
    if not hasattr(bank, "push"):
        return None
    bank.reset()
    bank.push(clip.frames.detach().contiguous(), clip.time)
    return bank


def get_memory_bank(model: Any) -> Any:
    """Return the bank with the last video of `encode_images_with_memory`, or before one the memory of `attach`."""
    prompts = prompt_memory_of(model)
    given = prompts.memory if hasattr(prompts.memory, "compress") else None
    return given if prompts.adapter.bank is None else prompts.adapter.bank


def has_memory_bank(model: Any) -> bool:
    """Return whether videos are compressed by a memory."""
    return bool(prompt_memory_of(model).enabled)


@register_adapter("videollama3_qwen2", detect=lambda model: Videollama3Qwen2.fits(model))
class Videollama3Qwen2(RemoteCodeAdapter):
    """Adapter with real placeholders, times as text before frames, plain positions, and prompts packed into one row.

    The model's class is written for transformers 4.46 and is recognised by its methods.
    """

    pixels = "pixel_values"
    frame_text = True
    methods = ("get_model",)
    functions: ClassVar = {
        function.__name__: function
        for function in (
            prepare_inputs_labels_for_multimodal, encode_images, _get_compression_mask, _maybe_truncate_visual_tokens,
            _compress_visual_tokens,
        )
    }  # fmt: skip
    optional = ("_maybe_truncate_visual_tokens",)
    added: ClassVar = {
        function.__name__: function for function in (encode_images_with_memory, get_memory_bank, has_memory_bank)
    }

    def __init__(self) -> None:
        self.call: Call | None = None
        self.bank: Any = None

    def hidden_size(self, model: nn.Module) -> int:
        return int(model.config.hidden_size)  # type: ignore[arg-type, union-attr]
