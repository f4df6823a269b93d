"""Measure whether an episodic memory freezes, by the distribution of overwrites over its slots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.banks import DualMemory, overwrite_entropy
from vmemory.banks.dual.rules import RULES


class Overwrites(NamedTuple):
    """The distribution of overwrites over the M slots of an episodic memory.

    bits: Entropy of the distribution, from 0 (one slot only) to log2(M); NaN without overwrites.
    untouched: Slots that were never overwritten, out of `slots`.
    times: Number of overwrites.
    held: Numbers of the frames held at the end.
    """

    bits: float
    untouched: int
    slots: int
    times: int
    held: list[int]


def compare_overwrites(
    frames: Tensor,
    *,
    capacity: tuple[int, int] = (8, 32),
    heads: int | None = None,
    rules: Sequence[str] = RULES,
    weights: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Overwrites]:
    """Push a clip into a `DualMemory` of each rule, with equal weights, and return the distributions of overwrites.

    By the rule of VLM² a fused frame is most similar to the slot written last, so only this slot is overwritten.

    Args:
        frames: `[T, H, W, D]` features, oldest first.
        capacity: Slots of the working and the episodic memory.
        heads: Attention heads; None = the greatest common divisor of D and 8.
        rules: Rules of `DualMemory` to compare.
        weights: `state_dict` of a memory with these heads; None = drawn anew.
        seed: Of the weights that are drawn; the global generator is left as it was.

    Returns:
        `Overwrites` of each rule, in the order of `rules`.

    Raises:
        ValueError: Frames or a rule do not fit; the message names it.

    Source: the rule is that of VLM² (arXiv 2511.20644), Algorithm 1, line 16 and after.
    """
    if frames.dim() != 4:
        raise ValueError(f"frames: expected [T, H, W, D], got shape {list(frames.shape)}")
    _, H, W, D = frames.shape
    found = {}
    for rule in rules:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            memory = DualMemory(
                D, (H, W), capacity, heads=heads or math.gcd(D, 8), rule=rule, dtype=frames.dtype,
                residual=weights is not None and "alpha" in weights,
            )  # fmt: skip
        if weights is not None:
            memory.load_state_dict(dict(weights))
        memory.to(frames.device).push(frames)
        overwrites = memory.overwrites[0]
        held = memory.entries()
        found[rule] = Overwrites(
            bits=float(overwrite_entropy(overwrites)),
            untouched=int((overwrites == 0).sum()),
            slots=len(overwrites),
            times=int(overwrites.sum()),
            held=held.frame[held.level == 1].tolist(),
        )
    return found
