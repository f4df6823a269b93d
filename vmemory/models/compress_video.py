"""Compress one video of a prompt with a memory, and assign the kept tokens to placeholders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vmemory.banks import Memory, MemoryConfig
from vmemory.models.adapter import Clip
from vmemory.models.memories import Compressor, GivenMemory, MemoryFactory


class KeptVideo(NamedTuple):
    """A compressed video, as the model reads it.

    Attributes:
        tokens: `[N, C]`, in the tower's dtype.
        source: `[N]` int64, sorted and unique: the token of the flattened `T·H·W` grid whose placeholder each kept
            token takes.
        grid: (T, H, W) of the video.
        mask: `[T, H, W]` bool, tokens that had a placeholder; None = all.
        tail: `[k, C]` rows after the frames, which always stay; or None.
        tokens_before: Number of the video's tokens in the original prompt.
    """

    tokens: Tensor
    source: Tensor
    grid: tuple[int, int, int]
    mask: Tensor | None
    tail: Tensor | None
    tokens_before: int


class VideoTokens(NamedTuple):
    """The number of a video's tokens in a prompt before and after compression, and their sources.

    Attributes:
        source: `[N]` int64, sorted and unique: the token of the flattened `T·H·W` grid whose place each kept token
            takes.
        grid: (T, H, W) of the video.
        tokens_before: Tokens of the video in the caller's prompt.
        tokens_after: Tokens of the video that the model reads.
    """

    source: Tensor
    grid: tuple[int, int, int]
    tokens_before: int
    tokens_after: int


def compress_video(pieces: Iterator[Clip], config: MemoryConfig, memory: GivenMemory | None = None) -> KeptVideo:
    """Compress one video, given in pieces of some frames each.

    If `config` makes the memory and no gradient is required, the pieces are pushed one by one, and the memory in use
    does not grow with the video. Otherwise the pieces are joined first.

    Args:
        pieces: At least one piece.
        config: Settings of the memory if none is given, and the length up to which videos are not compressed.
        memory: An object with `compress(clip, time, mask=…)`, or a callable that makes one from `dim`, `grid`,
            `key_dim`, `device` and `dtype`.
    """
    first = next(pieces)
    second = next(pieces, None)
    if second is None:
        return compress_clip(first, config, memory)
    if memory is not None or (torch.is_grad_enabled() and first.frames.requires_grad):
        return compress_clip(_joined([first, second, *pieces]), config, memory)
    return _streamed(first, second, pieces, config)


def _streamed(first: Clip, second: Clip, rest: Iterator[Clip], config: MemoryConfig) -> KeptVideo:
    H, W, C = first.frames.shape[1:]
    kind, short = first.frames.dtype, config.short_video()
    bank = config.build(C, (H, W), key_dim=first.key_dim, device=first.frames.device, dtype=kind)
    early: list[Clip] = []
    mask: list[Tensor] = []
    length = 0
    for clip in _chained(first, second, rest):
        bank.push(clip.frames.contiguous(), mask=clip.mask)
        length += clip.frames.shape[0]
        early = [*early, clip] if length <= short else []
        mask += [] if clip.mask is None else [clip.mask]
    if early:
        return _untouched(_joined(early))
    made = bank.read()
    whole = torch.cat(mask) if mask else None
    return _kept(made.tokens.to(kind), placed(made.source, whole), (length, H, W), whole, clip.tail)


def _chained(first: Clip, second: Clip, rest: Iterator[Clip]) -> Iterator[Clip]:
    yield first
    yield second
    yield from rest


def compress_clip(clip: Clip, config: MemoryConfig, memory: GivenMemory | None = None) -> KeptVideo:
    """Compress a whole video with the memory's `compress`, which is differentiable; arguments as above."""
    T, H, W, C = clip.frames.shape
    if config.short_video(given=memory is not None) >= T:
        return _untouched(clip)
    like: dict[str, Any] = {"key_dim": clip.key_dim, "dtype": clip.frames.dtype}
    if memory is None:
        memory = _planner(config, C, (H, W), **like)
    elif not hasattr(memory, "compress"):
        memory = cast("MemoryFactory", memory)(dim=C, grid=(H, W), device=clip.frames.device, **like)
    made = cast("Compressor", memory).compress(clip.frames, clip.time, mask=clip.mask)
    source = made.source if clip.mask is None else placed(made.source, clip.mask)
    return _kept(made.tokens.to(clip.frames.dtype), source, (T, H, W), clip.mask, clip.tail)


def _kept(
    tokens: Tensor, source: Tensor, grid: tuple[int, int, int], mask: Tensor | None, tail: Tensor | None
) -> KeptVideo:
    before = grid[0] * grid[1] * grid[2] if mask is None else int(mask.sum())
    return KeptVideo(tokens, source, grid, mask, tail, before + (0 if tail is None else tail.shape[0]))


def placed(source: Tensor, mask: Tensor | None) -> Tensor:
    """Return distinct existing cells `[N]` for tokens `source [N]`, in order.

    The source of a pooled or merged token may not exist. The token then takes the next existing cell, of its own frame
    if possible.

    Args:
        source: Sorted and unique.
        mask: `[T, H, W]` bool, cells that exist; None = all.

    Raises:
        ValueError: More tokens than cells.
    """
    if mask is None:
        return source
    exists = mask.flatten()
    cells, N = exists.nonzero().flatten(), len(source)
    if len(cells) < N:
        raise ValueError(f"memory: expected at most {len(cells)} tokens, as many as the video had, got {N}")
    total = exists.long().cumsum(0)
    frame = source // mask[0].numel()
    ends = total[mask[0].numel() - 1 :: mask[0].numel()][frame]
    order = torch.arange(N, device=source.device)
    behind = torch.searchsorted(frame, frame, right=True) - 1 - order
    rank = torch.minimum(total[source] - exists[source].long(), ends - 1 - behind).clamp(min=0)
    rank = torch.minimum((rank - order).cummax(0).values + order, len(cells) - N + order)
    return cells[rank]


@lru_cache(maxsize=16)
def _planner(config: MemoryConfig, dim: int, grid: tuple[int, int], key_dim: int, dtype: torch.dtype) -> Memory:
    """Return a memory that only compresses; it is cached, because its layout is costly to compute."""
    return config.build(dim, grid, key_dim=key_dim, device="meta", dtype=dtype)


def _untouched(clip: Clip) -> KeptVideo:
    """Keep a video unchanged."""
    T, H, W, C = clip.frames.shape
    tokens, source = clip.frames.reshape(-1, C), torch.arange(T * H * W, device=clip.frames.device)
    if clip.mask is not None:
        source = source[clip.mask.flatten()]
        tokens = tokens[source]
    return _kept(tokens, source, (T, H, W), clip.mask, clip.tail)


def _joined(clips: list[Clip]) -> Clip:
    """Join the pieces of one video; times that restart in each piece are dropped."""
    mask = None if clips[0].mask is None else torch.cat([c.mask for c in clips if c.mask is not None])
    return Clip(torch.cat([c.frames for c in clips]), clips[0].key_dim, mask, clips[-1].tail)
