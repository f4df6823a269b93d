"""Merge the frames of a short fragment down to a few, as MovieChat does before it remembers them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmemory.compress.reduced import as_streams
from vmemory.ops._checks import check_int


class MergedFragment(NamedTuple):
    """K frames made of T frames in order of time; without S where one clip came.

    Attributes:
        frames: `[S, K, H, W, D]`, the clip's dtype, differentiable.
        first, last: `[S, K]` int64, the places in the clip of the first and last frame merged into each.
    """

    frames: Tensor
    first: Tensor
    last: Tensor


class FragmentMerge(nn.Module):
    """Merge neighbouring frames until `frames` are left, the most similar pair first.

    The similarity of two neighbours is the mean of all dot products of a token of one with a token of the other, which
    is the product of their means. The pair becomes half the sum of both, whatever was merged into them before: unlike
    in `MergingBank` there is neither a norm nor a weight. Of equal pairs the first merges.

    MovieChat merges every 16 frames down to 2 and appends these to its memory:
    `bank.push(FragmentMerge(2)(fragment).frames)`.

    Args:
        frames: K, at least 1. A clip of no more frames stays as it is.

    Raises:
        TypeError, ValueError: `frames` does not fit.

    Source: MovieChat (arXiv 2307.16449), the consolidation of its short memory.
    """

    def __init__(self, frames: int) -> None:
        super().__init__()
        check_int("frames", frames, low=1)
        self.frames = frames

    def extra_repr(self) -> str:
        return f"frames={self.frames}"

    def forward(self, tokens: Tensor) -> MergedFragment:
        """Merge each clip on its own. No host synchronisation.

        Args:
            tokens: `[S, T, H, W, D]`, or `[T, H, W, D]` for one clip; float64, float32, float16 or bfloat16.

        Raises:
            TypeError, ValueError: `tokens` does not fit.
        """
        held = as_streams(tokens)
        S, T = held.shape[:2]
        first = torch.arange(T, device=held.device).expand(S, T)
        last = first
        for n in range(T, self.frames, -1):
            wide = held.detach().to(torch.promote_types(held.dtype, torch.float32))
            means = wide.mean((2, 3))
            place = (means[:, :-1] * means[:, 1:]).sum(-1).argmax(1, keepdim=True)
            entry = torch.arange(n - 1, device=held.device)
            # entries behind the pair move up by one
            after = (entry + (entry > place)).view(S, n - 1)
            here = (entry == place)[..., None, None, None]
            following = torch.where(here[..., 0, 0, 0], after + 1, after)
            first, last = first.gather(1, after), last.gather(1, following)
            rows = torch.arange(S, device=held.device)[:, None]
            held = torch.where(here, (held[rows, after] + held[rows, following]) / 2, held[rows, after])
        made = MergedFragment(held, first, last)
        return made if tokens.dim() == 5 else MergedFragment(*(field[0] for field in made))
