"""Pool each frame to a token grid that depends on the frame's number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmemory.compress.reduced import ReducedTokens, as_streams, seconds
from vmemory.ops._checks import check_int
from vmemory.ops.grid_pool_ragged import grid_pool_ragged


def _levels(num_frames: int, intervals: Sequence[int], start: int = 0) -> list[tuple[int, int]]:
    """Return (position in the clip, position in `intervals`) of each frame that an interval selects."""
    taken = (
        (t, next((i for i, step in enumerate(intervals) if (start + t) % step == 0), -1)) for t in range(num_frames)
    )
    return [(t, level) for t, level in taken if level >= 0]


def _check(intervals: Sequence[int], ratios: Sequence[int] | None) -> list[int]:
    for step in intervals:
        check_int("intervals", step, low=1)
    if ratios is None:
        return [2**i for i in range(len(intervals))]
    if len(ratios) != len(intervals):
        raise ValueError(f"ratios: expected one per interval ({len(intervals)}), got {len(ratios)}")
    for ratio in ratios:
        check_int("ratios", ratio, low=1)
    return list(ratios)


def tokens_arrange(
    num_frames: int, intervals: Sequence[int] = (8, 4, 1), ratios: Sequence[int] | None = None
) -> list[int]:
    """Return the factor by which each frame's token grid is reduced along both sides.

    Args:
        num_frames: Frames of the clip, numbered from 0.
        intervals: A frame takes the ratio of the first interval that divides its number.
        ratios: One per interval; None = 1, 2, 4, and so on.

    Returns:
        One ratio per frame, in order. A frame that no interval divides is skipped, and the list is that much shorter.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: VideoChat-Online (CVPR 2025), `tokens_arrange`, with its defaults.
    """
    check_int("num_frames", num_frames, low=0)
    sizes = _check(intervals, ratios)
    return [sizes[level] for _, level in _levels(num_frames, intervals)]


class TokenArrangement(nn.Module):
    """Area-pool each frame of a clip by the factor of `tokens_arrange`, as in the training of VideoChat-Online.

    Args:
        intervals, ratios: As in `tokens_arrange`.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: VideoChat-Online (CVPR 2025), section 3.2.
    """

    def __init__(self, intervals: Sequence[int] = (8, 4, 1), ratios: Sequence[int] | None = None) -> None:
        super().__init__()
        self.ratios = tuple(_check(intervals, ratios))
        self.intervals = tuple(intervals)

    def extra_repr(self) -> str:
        return f"intervals={self.intervals}, ratios={self.ratios}"

    def count(self, frames: int, grid: tuple[int, int], start: int = 0) -> int:
        """Return the number of tokens kept of `frames` frames with `grid` (H, W), numbered from `start`."""
        return sum(h * w for h, w in (self._size(level, grid) for _, level in _levels(frames, self.intervals, start)))

    def _size(self, level: int, grid: tuple[int, int]) -> tuple[int, int]:
        H, W = grid
        ratio = self.ratios[level]
        if ratio > min(H, W):
            raise ValueError(f"ratios: expected at most {min(H, W)} for a grid of {H} x {W}, got {ratio}")
        return H // ratio, W // ratio

    def forward(self, tokens: Tensor, time: Tensor | None = None, *, start: int = 0) -> ReducedTokens:
        """Return the pooled tokens in stream order, differentiable.

        Args:
            tokens: `[S, T, H, W, D]`, or `[T, H, W, D]` for one clip; float64, float32, float16 or bfloat16.
            time: `[T]` or `[S, T]` float64 seconds; None = unknown (NaN).
            start: Number of the first frame.

        Returns:
            `count(T, (H, W), start)` tokens per stream, without padding. A pooled token i of h along a side owns input
            cell floor((i + ½)·H/h).

        Raises:
            TypeError, ValueError: An argument does not fit, or a ratio exceeds the grid.
        """
        streams = as_streams(tokens)
        check_int("start", start, low=0)
        when = seconds(time, streams)
        S, T, H, W, D = streams.shape
        taken = _levels(T, self.intervals, start)
        sizes = [self._size(level, (H, W)) for _, level in taken]
        picked = streams[:, torch.tensor([t for t, _ in taken], dtype=torch.int64, device=streams.device)]
        pooled = grid_pool_ragged(picked.flatten(0, 1), sizes * S).tokens.reshape(S, -1, D)
        rows = [_frame_rows(t, level, size, (H, W)) for (t, level), size in zip(taken, sizes, strict=True)]
        table = torch.cat([torch.zeros((0, 4), dtype=torch.int64), *rows]).to(streams.device)
        frame, cell, level, pooled_cells = (column.expand(S, -1) for column in table.unbind(1))
        times = when[:, frame[0]] if S else when.new_zeros((0, table.shape[0]))
        reduced = ReducedTokens(
            tokens=pooled,
            frame=frame,
            time=times,
            cell=cell,
            level=level,
            weight=H * W / pooled_cells.float(),
            source=frame * (H * W) + cell,
            start=times,
            stop=times,
            count=torch.full((S,), table.shape[0], dtype=torch.int64, device=streams.device),
        )
        return reduced.only() if tokens.dim() == 4 else reduced


def _frame_rows(frame: int, level: int, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return `[h·w, 4]` int64 for a frame: frame, owned cell and level of each token, and the frame's token count."""
    rows, columns = ((2 * torch.arange(m) + 1) * n // (2 * m) for n, m in zip(grid, size, strict=True))
    cell = (rows[:, None] * grid[1] + columns).flatten()
    frames, levels, numbers = (torch.full_like(cell, n) for n in (frame, level, cell.numel()))
    return torch.stack([frames, cell, levels, numbers], 1)
