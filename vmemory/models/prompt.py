"""Shrink a prompt with its videos: compute one keep-mask over its tokens, and gather everything by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmemory.banks import MemoryConfig
from vmemory.models.adapter import Adapter, Clip, Inputs, known_arguments
from vmemory.models.compress_video import KeptVideo, compress_clip, compress_video
from vmemory.models.frame_text import Span, close_gaps, dead_spans
from vmemory.models.memories import GivenMemory
from vmemory.models.turn import Turn


class CompressedPrompt(NamedTuple):
    """A shrunk prompt: the inputs for the model, and their relation to the original prompt.

    Attributes:
        inputs: For `forward` or `generate`.
        keep: `[B, L]` bool, tokens of the original prompt that are in the new one.
        rope_deltas: `[B, 1]` int64 for models that keep them between calls, else None.
        turn: The original and the new prompt.
        videos: Each compressed video.
    """

    inputs: Inputs
    keep: Tensor
    rope_deltas: Tensor | None
    turn: Turn
    videos: list[KeptVideo]


def compress_prompt(
    model: nn.Module,
    adapter: Adapter,
    inputs: Inputs,
    config: MemoryConfig,
    memory: GivenMemory | None,
    *,
    generating: bool,
) -> CompressedPrompt:
    """Encode the videos of a prompt, compress them with a memory, and shrink the prompt accordingly.

    The model is not changed.

    Args:
        model: A model that accepts `mm_encoder_outputs`.
        adapter: The adapter of its family.
        inputs: Inputs of `forward` or `generate`, with pixels and `input_ids [B, L]`.
        config: Settings of the memory if none is given; the tower encodes `memory_chunk_frames` at a time.
        memory: A memory, or None.
        generating: Whether for `generate`, which needs padding on the left and a text row above three-row positions.

    Raises:
        ValueError: The numbers of placeholders and features differ, or the attention mask is not `[B, L]`.
    """
    ids: Tensor = inputs["input_ids"]
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected {tuple(ids.shape)}, got {tuple(mask.shape)}")
    located = adapter.positions(model, inputs) if inputs.get("position_ids") is None else None
    if config.memory_chunk_frames is None:
        clips, output = adapter.encode(model, inputs)
        kept = [compress_clip(clip, config, memory) for clip in clips]
    else:
        kept, output = _in_chunks(model, adapter, inputs, config, memory, config.memory_chunk_frames)
    keep, spans = keep_mask(ids, adapter, model, kept)

    new = {name: value for name, value in inputs.items() if name not in adapter.consumed}
    everything = bool(keep.all())
    real = torch.ones_like(keep) if mask is None else mask.bool()
    dropped = (~keep & real).sum(-1, keepdim=True)
    column = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if located is not None:
        new["position_ids"] = located[0]
    if not everything:
        keep &= real
        if located is not None and spans:
            new["position_ids"] = located[0].clone()
            for row, gone in spans:
                close_gaps(new["position_ids"], row, gone)
        columns = _columns(keep, left=generating or bool((~real[:, 0]).any()))
        column = columns.new
        if mask is not None or bool((~columns.there).any()):
            new["attention_mask"] = real.long() if mask is None else mask
        fills = {"input_ids": padding_id(model), "labels": -100}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "position_ids", "labels"):
            if new.get(name) is not None:
                lead = new[name].shape[:-2]
                old, there = (x.expand(*lead, *x.shape) for x in columns[:2])
                new[name] = new[name].gather(-1, old).masked_fill(~there, fills.get(name, 0))
    if located is not None:
        positions = new["position_ids"]
        if generating:
            new["position_ids"] = with_text_row(positions, new.get("attention_mask"))
    tokens = [k.tokens if k.tail is None else torch.cat([k.tokens, k.tail.to(k.tokens)]) for k in kept]
    features = {adapter.modality: adapter.pack(output, tokens)}
    if adapter.modality != "image" and inputs.get("pixel_values") is not None:
        features["image"] = _image_features(model, adapter, inputs)
    new["mm_encoder_outputs"] = features
    deltas = None if located is None else located[1] + dropped.to(located[1])
    read = new.get("attention_mask")
    read = torch.ones_like(new["input_ids"]) if read is None else read
    offset = None if located is None else _offset(positions, read)
    return CompressedPrompt(new, keep, deltas, Turn(ids, new["input_ids"], read, column, offset), kept)


def _in_chunks(
    model: nn.Module, adapter: Adapter, inputs: Inputs, config: MemoryConfig, memory: GivenMemory | None, chunk: int
) -> tuple[list[KeptVideo], Any]:
    """Run each video through tower and memory, `chunk` frames at a time; return kept videos and a tower's output."""
    last: list[Any] = []

    def encoded(pieces: Iterator[Inputs]) -> Iterator[Clip]:
        for piece in pieces:
            clips, output = adapter.encode(model, piece)
            last[:] = [output]
            yield clips[0]

    videos = adapter.iter_chunks(model, inputs, chunk)
    return [compress_video(encoded(pieces), config, memory) for pieces in videos], last[0]


def _image_features(model: nn.Module, adapter: Adapter, inputs: Inputs) -> Any:
    """Encode the pictures beside the videos, because `forward` accepts either pixels or features."""
    get = adapter.feature_module(model).get_image_features
    return get(**known_arguments(get, inputs), return_dict=True)


def keep_mask(
    ids: Tensor, adapter: Adapter, model: nn.Module, kept: list[KeptVideo]
) -> tuple[Tensor, list[tuple[int, list[Span]]]]:
    """Return the mask of tokens `[B, L]` that stay, and per row the spans of frames without tokens."""
    L = ids.shape[1]
    places = (ids.flatten() == adapter.placeholder_id(model)).nonzero().flatten()
    counts = [k.tokens_before for k in kept]
    wanted = sum(counts)
    if len(places) != wanted:
        raise ValueError(f"input_ids: expected {wanted} placeholders for the videos' tokens, got {len(places)}")
    keep = torch.ones(ids.numel(), dtype=torch.bool, device=ids.device)
    at, spans = 0, []
    for k, count in zip(kept, counts, strict=True):
        mine = places[at : at + count]
        at += len(mine)
        source, tail = k.source.to(ids.device), 0 if k.tail is None else k.tail.shape[0]
        if k.mask is not None:
            # only mask cells have placeholders
            source = (k.mask.flatten().long().cumsum(0) - 1).to(ids.device)[source]
        keep[mine[: len(mine) - tail]] = False
        keep[mine[source]] = True
        if adapter.frame_text and len(source) < len(mine) and len(mine):
            row = int(mine[0]) // L
            gone = dead_spans(ids[row], keep[row * L : (row + 1) * L], mine - row * L, k.grid[0])
            for start, stop in gone:
                keep[row * L + start : row * L + stop] = False
            spans.append((row, gone))
    return keep.view(ids.shape), spans


def padding_id(model: Any) -> int:
    """Return the padding id of prompts."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return int(config.pad_token_id)
    return 0


class _Columns(NamedTuple):
    """The columns of a shrunk prompt of L' tokens.

    `old [B, L']` int64 names the original column of each, `there [B, L']` bool those that are not padding, and
    `new [B, L]` int64 the new column of each original one, or of the last kept one before it.
    """

    old: Tensor
    there: Tensor
    new: Tensor


def _columns(keep: Tensor, left: bool) -> _Columns:
    """Return the columns of the kept tokens `[B, L]`, with padding on the left or the right."""
    count = keep.sum(-1, keepdim=True)
    longest = int(count.max())
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    before = longest - count if left else torch.zeros_like(count)
    at = torch.arange(longest, device=keep.device) - before
    there = (at >= 0) & (at < count)
    return _Columns(order.gather(1, at.clamp(min=0)), there, (keep.cumsum(-1) - 1).clamp(min=0) + before)


def _offset(positions: Tensor, mask: Tensor) -> Tensor:
    """Return `[B, 1]`: the offset of three-row positions `[3, B, L]` from plain ones after the prompt."""
    column = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), column, -1).amax(-1, keepdim=True).clamp(min=0)
    ends = positions.amax(0).gather(1, last.to(positions.device))
    return ends + 1 - mask.long().sum(-1, keepdim=True).to(ends)


def with_text_row(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Return `[4, B, L]` positions for `generate`: a row of plain text positions above the three rows.

    transformers reads gaps in the top row as borders of packed sequences.
    """
    _, B, L = positions.shape
    if mask is None:
        text = torch.arange(L, device=positions.device).expand(B, L)
    else:
        text = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.cat([text[None].to(positions), positions])
