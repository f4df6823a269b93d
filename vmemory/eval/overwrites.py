"""Whether an episodic memory goes on learning or freezes: where the overwrites of its slots fall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.banks import DualMemory, overwrite_entropy
from vmemory.banks.dual_rules import RULES


class Overwrites(NamedTuple):
    """How the overwrites of an episodic memory fell on its M slots.

    bits: Entropy of where they fell, 0 = one slot only, log2(M) at most; NaN where nothing was overwritten.
    untouched: Slots that were never overwritten, out of `slots`.
    times: Overwrites in all.
    held: Numbers of the frames held in the end.
    """

    bits: float
    untouched: int
    slots: int
    times: int
    held: list[int]


def compare_overwrites(
    frames: Tensor,
    *,
    capacities: tuple[int, int] = (8, 32),
    heads: int | None = None,
    rules: Sequence[str] = RULES,
    weights: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Overwrites]:
    """Run a clip through a `DualMemory` of each rule, with equal weights, and tell where overwrites fell.

    With the rule of VLM² a fused frame is most like the slot that was written last, and that slot alone is overwritten.

    Args:
        frames: `[T, H, W, D]` features, oldest first.
        capacities: Slots of the working and the episodic memory.
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
                D, (H, W), capacities, heads=heads or math.gcd(D, 8), rule=rule, dtype=frames.dtype,
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
