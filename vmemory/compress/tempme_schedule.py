"""Compute the layers in which TempMe joins clips, and the number of tokens that merge in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from vmemory.ops._checks import check_int


class MergeStep(NamedTuple):
    """The merges of one encoder layer, and the shape of a video after the layer.

    Attributes:
        join: Neighbouring clips that are joined before the attention; 1 = none.
        cross: Tokens that merge when clips are joined, per joined clip.
        intra: Tokens that merge between attention and MLP, per clip.
        clips: Clips of a video after the layer.
        cls: Class tokens of a clip, one for each of its frames.
        tokens: Tokens of a clip, class tokens included.
    """

    join: int
    cross: int
    intra: int
    clips: int
    cls: int
    tokens: int


def parse_numbers(name: str, value: Any) -> tuple[int, ...]:
    """Return `"8-9-10"` or a sequence of ints as a tuple; an empty string gives an empty tuple."""
    if isinstance(value, str):
        parts = value.split("-") if value else []
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f"{name}: expected numbers joined by '-', as in '8-9-10', got {value!r}")
        return tuple(map(int, parts))
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a string as '8-9-10' or a sequence of ints, got {type(value).__name__}")
    for number in value:
        check_int(name, number, low=0)
    return tuple(value)


def _evens(cls: int, tokens: int) -> int:
    """Return how many of the rows from `cls` to `tokens` may merge into others."""
    return (tokens + 1) // 2 - (cls + 1) // 2 if tokens // 2 > cls // 2 else 0


def tempme_schedule(
    layers: int,
    tokens: int,
    frames: int = 12,
    merge_layers: str | Sequence[int] = "8-9-10",
    merge_frames: str | Sequence[int] = "2-2-3",
    r: int = 2,
    proportions: str | Sequence[int] = "30-10",
) -> tuple[MergeStep, ...]:
    """Return the merges of each layer of a vision transformer.

    Each layer before the first of `merge_layers` merges `r` tokens of every frame. Each merge layer joins clips, merges
    the first proportion of the joined clip's tokens and then the second proportion of the remaining tokens. The layers
    behind it merge the second proportion. A proportion never merges more than half of the patch tokens.

    Args:
        layers: Layers of the transformer.
        tokens: Tokens of a frame, with its class token.
        frames: Frames of a video.
        merge_layers: Layers that join clips, counted from 0, ascending; `"8-9-10"` or ints. May be empty.
        merge_frames: How many neighbouring clips each of them joins; their product divides `frames`.
        r: Tokens that merge in each layer before the first merge layer.
        proportions: Per cent of the tokens that merge across and within clips.

    Returns:
        A `MergeStep` for every layer.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A number breaks a rule above, or `r` exceeds the number of tokens that a layer can merge.

    Source: TempMe (ICLR 2025, arXiv 2409.01156) section 3, whose options are `merge_layer`, `merge_frame_num`,
    `tome_r` and `merge_token_proportion`. Proportions are computed in integers, to avoid rounding errors.
    """
    for name, number, low in (("layers", layers, 1), ("tokens", tokens, 1), ("frames", frames, 1), ("r", r, 0)):
        check_int(name, number, low=low)
    where, joins = parse_numbers("merge_layers", merge_layers), parse_numbers("merge_frames", merge_frames)
    if list(where) != sorted(set(where)) or (where and where[-1] >= layers):
        raise ValueError(f"merge_layers: expected ascending layers from 0 to {layers - 1}, got {merge_layers!r}")
    if len(joins) != len(where) or any(join < 2 for join in joins):
        raise ValueError(f"merge_frames: expected {len(where)} numbers of at least 2, got {merge_frames!r}")
    if frames % prod(joins):
        raise ValueError(f"merge_frames: expected a product that divides {frames} frames, got {merge_frames!r}")
    shares = parse_numbers("proportions", proportions)
    if len(shares) != 2 or max(shares) > 100:
        raise ValueError(f"proportions: expected two numbers from 0 to 100, got {proportions!r}")

    clips, cls, steps = frames, 1, []
    for layer in range(layers):
        join = joins[where.index(layer)] if layer in where else 1
        cross = 0
        clips, cls, tokens = clips // join, cls * join, tokens * join
        if join > 1:
            cross = min((tokens - cls) // 2, tokens * shares[0] // 100)
            tokens -= cross
        if not where or layer < where[0]:
            intra = r
            if r > _evens(cls, tokens):
                raise ValueError(f"r: expected at most {_evens(cls, tokens)} in layer {layer}, got {r}")
        else:
            intra = min((tokens - cls) // 2, tokens * shares[1] // 100)
        tokens -= intra
        steps.append(MergeStep(join, cross, intra, clips, cls, tokens))
    return tuple(steps)
