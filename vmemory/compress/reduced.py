"""The result type of token reducers: kept tokens with the same provenance fields as `MemoryTokens`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.ops._checks import check_device, check_floating, shape_of
from vmemory.ops.select_tokens import compact


class ReducedTokens(NamedTuple):
    """Kept tokens of a clip in stream order, with the same fields as `vmemory.banks.MemoryTokens`.

    One clip gives N tokens; clips of several streams give `[S, Nmax, ...]`, padded, and fill `count [S]`.

    Attributes:
        tokens: `[N, D]`, the clip's dtype, differentiable; padding is 0.
        frame: `[N]` int64 place of the frame in the clip; −1 = padding, as in `cell`, `level` and `source`.
        time: `[N]` float64 seconds, NaN for a clip without times.
        cell: `[N]` int64 cell h·W + w of the input grid that the token owns.
        level: `[N]` int64 0, or the place of the frame's ratio in a `TokenArrangement`.
        weight: `[N]` float32 number of input cells whose mean the token is.
        source: `[N]` int64 position in the flattened T·H·W clip: sorted, unique.
        start, stop: `[N]` float64, equal to `time`, because a reducer merges no frames.
        count: `[S]` int64 tokens per stream, else None.
    """

    tokens: Tensor
    frame: Tensor
    time: Tensor
    cell: Tensor
    level: Tensor
    weight: Tensor
    source: Tensor
    start: Tensor
    stop: Tensor
    count: Tensor | None = None  # type: ignore[assignment]  # shadows tuple.count on purpose

    def stream(self, stream: int) -> ReducedTokens:
        """Return one stream without its padding. Synchronises the host once, to read the count."""
        if not isinstance(self.count, Tensor):
            raise ValueError("stream: expected the padded tokens of several streams, these belong to one clip")
        n = int(self.count[stream])
        return ReducedTokens(*(field[stream, :n] for field in self[:-1]))

    def only(self) -> ReducedTokens:
        """Return the tokens of a single stream that has no padding."""
        return ReducedTokens(*(field[0] for field in self[:-1]))


def as_streams(tokens: Tensor) -> Tensor:
    """Return `[T, H, W, D]` or `[S, T, H, W, D]` tokens as `[S, T, H, W, D]`.

    Raises:
        TypeError, ValueError: `tokens` is neither.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a tensor [S, T, H, W, D] or [T, H, W, D], got {type(tokens).__name__}")
    if tokens.dim() not in (4, 5):
        raise ValueError(f"tokens: expected [S, T, H, W, D] or [T, H, W, D], got shape {shape_of(tokens)}")
    check_floating("tokens", tokens)
    if tokens.shape[-3] < 1 or tokens.shape[-2] < 1:
        raise ValueError(f"tokens: expected a grid of at least 1 cell, got shape {shape_of(tokens)}")
    return tokens[None] if tokens.dim() == 4 else tokens


def seconds(time: Tensor | None, tokens: Tensor) -> Tensor:
    """Return times `[S, T]` float64 on the device of `tokens [S, T, H, W, D]`; NaN for None.

    Raises:
        TypeError, ValueError: `time` is no float64 tensor `[T]` or `[S, T]`.
    """
    S, T = tokens.shape[:2]
    if time is None:
        return torch.full((S, T), torch.nan, dtype=torch.float64, device=tokens.device)
    if not isinstance(time, Tensor):
        raise TypeError(f"time: expected a tensor [{T}] or [{S}, {T}], got {type(time).__name__}")
    if time.dtype != torch.float64:
        raise ValueError(f"time: expected float64 seconds, got {time.dtype}")
    if time.shape not in ((T,), (S, T)):
        raise ValueError(f"time: expected shape [{T}] or [{S}, {T}], got {shape_of(time)}")
    return time.to(tokens.device).expand(S, T)


def existing(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return `mask [S, T, H, W]` or `[T, H, W]` bool as `[S, T, H·W]`.

    Raises:
        TypeError, ValueError: `mask` does not fit `tokens [S, T, H, W, D]`.
    """
    if mask is None:
        return None
    S, T, H, W = tokens.shape[:4]
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a bool tensor [{S}, {T}, {H}, {W}], got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape not in ((S, T, H, W), (T, H, W)):
        raise ValueError(f"mask: expected bool [{S}, {T}, {H}, {W}], got {mask.dtype} of shape {shape_of(mask)}")
    check_device("mask", mask, "tokens", tokens)
    return mask.expand(S, T, H, W).flatten(2)


def kept(tokens: Tensor, source: Tensor, count: Tensor, time: Tensor) -> ReducedTokens:
    """Gather `tokens [S, T, H, W, D]` at `source [S, K]` (ascending, then −1), with provenance, on the device."""
    cells = tokens.shape[2] * tokens.shape[3]
    there = source >= 0
    frame = torch.where(there, source // cells, -1)
    when = torch.where(there, time.gather(1, frame.clamp_min(0)), torch.nan) if time.shape[1] else time[:, :0]
    return ReducedTokens(
        tokens=compact(tokens.flatten(1, 3), source).tokens,
        frame=frame,
        time=when,
        cell=torch.where(there, source % cells, -1),
        level=torch.where(there, 0, -1),
        weight=there.float(),
        source=source,
        start=when,
        stop=when,
        count=count,
    )
