"""Keep the tokens that differ from the token at the same position of the previous frame."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vmemory.compress.pixels import pixel_difference
from vmemory.compress.reduced import ReducedTokens, as_streams, existing, kept, seconds
from vmemory.ops._checks import check_choice, check_device, check_int, shape_of
from vmemory.ops.adjacent_similarity import adjacent_similarity
from vmemory.ops.select_tokens import Selection, select_tokens


class TokenDifference(nn.Module):
    """Drop tokens that repeat the token at the same position of the previous frame.

    A threshold, an exact count, or the dropped share of each frame determines the kept tokens.

    The difference of a token is 1 − cosine of the features, or the mean absolute difference of the pixels under the
    token in grey levels. In the first frame it is infinite. A difference of NaN counts as the largest, so such a token
    stays. Each frame is compared with the previous frame of the clip, kept or not.

    Args:
        by: `"feature"` or `"pixel"`.
        threshold: Keep a token when its difference exceeds this.
        budget: Keep exactly this number of tokens per clip: those that differ most, the earlier of equals. An int, or a
            fraction of the clip's tokens (a float in (0, 1], rounded down, but at least one frame's tokens). See
            `count`.
        drop: Drop this share of each frame's tokens, rounded down: those that differ least, the later of equals. A
            number in [0, 1]. Tokens without a predecessor stay and do not count.
        min_tokens: With a threshold, a frame that would keep fewer tokens keeps its first `min_tokens` cells.
        key_dim: The cosine looks at the first `key_dim` channels; None = all.

    Raises:
        TypeError, ValueError: Not exactly one of `threshold`, `budget`, `drop` is given, or an argument does not fit.

    Source: TimeChat-Online (arXiv 2504.17343), differential token drop, which drops above a cosine of 0.5 (threshold
    0.5 here; `drop` is its relative mode); Efficient Video Sampling (arXiv 2510.14624), which keeps a fraction.
    """

    def __init__(
        self,
        by: Literal["feature", "pixel"] = "feature",
        *,
        threshold: float | None = None,
        budget: int | float | None = None,
        drop: float | None = None,
        min_tokens: int = 0,
        key_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("by", by, ("feature", "pixel"))
        if [threshold, budget, drop].count(None) != 2:
            raise ValueError("threshold: expected exactly one of threshold, budget and drop")
        for name, number in (("threshold", threshold), ("drop", drop)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
                raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
        if drop is not None and not 0 <= drop <= 1:
            raise ValueError(f"drop: expected a share in [0, 1], got {drop}")
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ValueError(f"budget: expected a fraction in (0, 1] or an int, got {budget}")
        elif budget is not None:
            check_int("budget", budget, low=0)
        check_int("min_tokens", min_tokens, low=0)
        if key_dim is not None:
            check_int("key_dim", key_dim, low=1)
        self.by, self.threshold, self.budget, self.drop = by, threshold, budget, drop
        self.min_tokens, self.key_dim = min_tokens, key_dim

    def extra_repr(self) -> str:
        limits = {"threshold": self.threshold, "budget": self.budget, "drop": self.drop}
        limit = next(f"{name}={value}" for name, value in limits.items() if value is not None)
        return f"{self.by!r}, {limit}, min_tokens={self.min_tokens}, key_dim={self.key_dim}"

    def count(self, frames: int, cells: int) -> int:
        """Return the number of tokens kept of `frames` frames with `cells` tokens each, before the clip is there.

        Raises:
            ValueError: This reducer has a threshold, so the number depends on the values.
        """
        check_int("frames", frames, low=0)
        check_int("cells", cells, low=1)
        total = frames * cells
        if self.drop is not None:
            return total - max(frames - 1, 0) * int(cells * self.drop)
        if self.budget is None:
            raise ValueError("count: expected a reducer with a budget, a threshold keeps as many as the clip asks for")
        wanted = max(int(total * self.budget), cells) if isinstance(self.budget, float) else self.budget
        return min(wanted, total)

    def difference(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Return the difference of each token from its predecessor, `[S, T, H·W]` float32 (float64 for float64).

        +inf for tokens without a predecessor: in the first frame without `previous`, and where the predecessor does not
        exist. Arguments and errors as in `forward`.
        """
        tokens = as_streams(tokens)
        H, W, D = tokens.shape[2:]
        there = existing(mask, tokens)
        if self.by == "pixel":
            frames = _after(self._pixels(tokens, pixels), previous)
            changed = pixel_difference(frames, (H, W)).flatten(2)
        else:
            if pixels is not None:
                raise ValueError("pixels: expected none, this reducer compares features")
            if self.key_dim is not None:
                check_int("key_dim", self.key_dim, high=D)
            frames = _after(tokens.detach(), previous)
            changed = 1 - adjacent_similarity(frames[..., : self.key_dim].flatten(2, 3), "token")
        if there is not None:
            before = there[:, :-1]
            if previous is not None:
                before = torch.cat([torch.ones_like(there[:, :1]), before], 1)
            changed = torch.where(before, changed, torch.inf)
        if previous is not None:
            return changed
        first = changed.new_full((changed.shape[0], min(tokens.shape[1], 1), H * W), torch.inf)
        return torch.cat([first, changed], 1)

    def _pixels(self, tokens: Tensor, pixels: Tensor | None) -> Tensor:
        if not isinstance(pixels, Tensor):
            raise TypeError(f"pixels: expected a tensor [S, T, C, h, w] or [T, C, h, w], got {type(pixels).__name__}")
        pixels = pixels[None] if pixels.dim() == 4 else pixels
        if pixels.dim() != 5 or pixels.shape[:2] != tokens.shape[:2]:
            S, T = tokens.shape[:2]
            raise ValueError(f"pixels: expected [{S}, {T}, C, h, w], got shape {shape_of(pixels)}")
        check_device("pixels", pixels, "tokens", tokens)
        return pixels

    def mask(
        self,
        tokens: Tensor,
        *,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Return which tokens stay, bool `[S, T, H, W]` or `[T, H, W]` like the tokens: a `mask` for `Bank.push`.

        Arguments and errors as in `forward`. No host synchronisation.
        """
        streams = as_streams(tokens)
        S, T, H, W = streams.shape[:4]
        there = existing(mask, streams)
        difference = self.difference(tokens, pixels, mask, previous)
        if self.budget is None:
            stay = self._staying(difference, there, previous is None)
        else:
            source = self._best(difference, there).indices
            # the additional element takes the padding
            flags = torch.zeros((S, T * H * W + 1), dtype=torch.bool, device=source.device)
            stay = flags.scatter_(1, torch.where(source >= 0, source, T * H * W), True)[:, :-1]
        stay = stay.reshape(S, T, H, W)
        return stay[0] if tokens.dim() == 4 else stay

    def _staying(self, difference: Tensor, there: Tensor | None, begins: bool) -> Tensor:
        """Return `[S, T, N]` bool by threshold or share; `begins` tells whether the stream begins with this clip."""
        if self.drop is not None:
            return self._but_the_least(self.drop, difference, there, begins)
        assert self.threshold is not None
        # negated, so that NaN stays
        stay = ~(difference <= self.threshold)
        if there is not None:
            stay &= there
        if self.min_tokens:
            exists = torch.ones_like(stay) if there is None else there
            first = exists & (exists.cumsum(-1) <= self.min_tokens)
            stay |= first & (stay.sum(-1, keepdim=True) < self.min_tokens)
        return stay

    def _but_the_least(self, drop: float, difference: Tensor, there: Tensor | None, begins: bool) -> Tensor:
        exists = torch.ones_like(difference, dtype=torch.bool) if there is None else there
        before = torch.cat([torch.full_like(exists[:, :1], not begins), exists[:, :-1]], 1)
        compared = exists & before
        n = compared.sum(-1, keepdim=True)
        staying = n - (n.double() * drop).long()
        # tokens without a comparison sort last, so that ranks count compared tokens only; NaN sorts as the largest
        order = torch.where(compared, difference, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return exists & (~compared | (order.argsort(-1) < staying))

    def _best(self, difference: Tensor, there: Tensor | None) -> Selection:
        S, T, N = difference.shape
        budget = self.count(T, N)
        scores = difference.flatten(1)
        if there is None:
            count = torch.full((S,), budget, dtype=torch.int64, device=scores.device)
            return Selection(select_tokens(scores, budget), count)
        return select_tokens(scores, [budget], torch.where(there.flatten(1), 0, -1))

    def forward(
        self,
        tokens: Tensor,
        time: Tensor | None = None,
        *,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> ReducedTokens:
        """Return the kept tokens in stream order, differentiable.

        Args:
            tokens: `[S, T, H, W, D]`, or `[T, H, W, D]` for one clip; float64, float32, float16 or bfloat16.
            time: `[T]` or `[S, T]` float64 seconds; None = unknown (NaN).
            pixels: `[S, T, C, h, w]` or `[T, C, h, w]` for `by="pixel"`, h and w multiples of H and W; see
                `pixel_difference`.
            mask: `[S, T, H, W]` or `[T, H, W]` bool, True where a cell exists. Other cells are never kept; if fewer
                cells exist than the budget, all of them stay.
            previous: The frame before the first, for a stream in pieces: `[S, H, W, D]` or `[H, W, D]`, for
                `by="pixel"` `[S, C, h, w]` or `[C, h, w]`. All of its cells exist. None = the stream begins here.

        Returns:
            One clip: its tokens, without padding. Several streams: padded, with `count [S]`. With a budget and without
            `mask` the number is known in advance, so nothing is padded. One clip with a threshold or with `mask`
            synchronises the host once; other calls do not.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        streams = as_streams(tokens)
        when = seconds(time, streams)
        there = existing(mask, streams)
        difference = self.difference(tokens, pixels, mask, previous)
        if self.budget is None:
            stay = self._staying(difference, there, previous is None).flatten(1)
            chosen = select_tokens(difference.flatten(1), [stay.shape[1]], torch.where(stay, 0, -1))
        else:
            chosen = self._best(difference, there)
        reduced = kept(streams, chosen.indices, chosen.count, when)
        if tokens.dim() == 5:
            return reduced
        return reduced.only() if self.budget is not None and there is None else reduced.stream(0)


def _after(frames: Tensor, previous: Tensor | None) -> Tensor:
    """Prepend `previous [S, ...]` to `frames [S, T, ...]`."""
    if previous is None:
        return frames
    shape = frames.shape[:1] + frames.shape[2:]
    if not isinstance(previous, Tensor):
        raise TypeError(f"previous: expected a tensor {list(shape)}, got {type(previous).__name__}")
    if previous.shape not in (shape, shape[1:]) or previous.dtype != frames.dtype:
        got = f"{previous.dtype} of shape {shape_of(previous)}"
        raise ValueError(f"previous: expected {frames.dtype} {list(shape)}, got {got}")
    check_device("previous", previous, "frames", frames)
    return torch.cat([previous.detach().expand(shape)[:, None], frames], 1)


class PixelDifference(TokenDifference):
    """Drop tokens whose pixels do not change, as VideoLLaMA3 does; each frame keeps at least one token.

    Args:
        threshold: Grey levels of normalised pixels (mean and standard deviation 0.5, so two levels are one of 255).
        min_tokens: As in `TokenDifference`.

    Source: VideoLLaMA3 (arXiv 2501.13106), the differential frame pruner.
    """

    def __init__(self, threshold: float = 0.1, *, min_tokens: int = 1) -> None:
        super().__init__("pixel", threshold=threshold, min_tokens=min_tokens)
