"""A fragment merged down to a few frames, beside a loop over all pairs of tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vmemory.compress import FragmentMerge
from vmemory.testing import random_tensor


def by_hand(clip: Tensor, frames: int) -> tuple[Tensor, list[list[int]]]:
    """Entries `[K, H, W, D]` and the frames in each: the mean of all dot products, and half of each of a pair."""
    held = [(frame, [t]) for t, frame in enumerate(clip)]
    while len(held) > frames:
        scores = [float((a.flatten(0, 1) @ b.flatten(0, 1).T).mean()) for (a, _), (b, _) in pairwise(held)]
        i = scores.index(max(scores))
        (a, of_a), (b, of_b) = held[i : i + 2]
        held[i : i + 2] = [((a + b) / 2, of_a + of_b)]
    return torch.stack([frame for frame, _ in held]), [of for _, of in held]


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 20])
def test_equals_the_loop(frames: int) -> None:
    clips = random_tensor(3, 9, 2, 3, 4).cumsum(1)
    merged = FragmentMerge(frames)(clips)
    assert merged.frames.shape == (3, min(frames, 9), 2, 3, 4)
    for s, clip in enumerate(clips):
        wanted, of = by_hand(clip, frames)
        torch.testing.assert_close(merged.frames[s], wanted)
        assert merged.first[s].tolist() == [members[0] for members in of]
        assert merged.last[s].tolist() == [members[-1] for members in of]
        alone = FragmentMerge(frames)(clip)
        for one, several in zip(alone, merged, strict=True):
            assert torch.equal(one, several[s])


def test_the_first_of_equal_pairs_merges_and_weights_halve() -> None:
    clip = torch.ones(4, 1, 1, 2).requires_grad_()
    merged = FragmentMerge(1)(clip)
    merged.frames.sum().backward()
    # the first two, then the third with them, then the fourth
    assert clip.grad[:, 0, 0, 0].tolist() == [0.125, 0.125, 0.25, 0.5]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="frames: expected at least 1"):
        FragmentMerge(0)
    with pytest.raises(ValueError, match=r"tokens: expected \[S, T, H, W, D\] or"):
        FragmentMerge(2)(torch.ones(2, 3))
