"""Condense a clip to a number of frames that depends on its content."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.compress.resampler import QueryResampler
from vmemory.ops._checks import check_int


class AdaptiveFrameResampler(QueryResampler):
    """Cut a clip where new content begins, and condense each piece to one frame.

    A learned score gives the likelihood that new content begins at a frame. The sum of these likelihoods, within the
    bounds, is the number of output frames. The frames with the largest scores begin the pieces. Within a piece the
    score is part of a frame's share, which trains the score. To get fewer frames, add the sum of `scores.sigmoid()` to
    the loss.

    Args:
        max_input_frames: Most frames a clip may have.
        min_output_frames: Fewest output frames, for clips with at least as many frames.
        max_output_frames: Most output frames, and the length K of every output. For models of a fixed length (STOP: 12)
            it equals `min_output_frames`.
        hidden_dim, num_layers, num_heads, dropout: Of the transformer; `hidden_dim` is a multiple of `num_heads`.
        channels: Channels C of a frame.
        hard: Return the frame with the largest share of each piece, unchanged, instead of the piece's weighted mean.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: the "adaptive" compressor of the TempMe and STOP integration (parameters `tempme_max_input_frames`,
    `tempme_min_output_frames`, `tempme_max_output_frames`).
    """

    def __init__(
        self,
        max_input_frames: int = 64,
        min_output_frames: int = 8,
        max_output_frames: int = 16,
        hidden_dim: int = 512,
        num_layers: int = 3,
        num_heads: int = 8,
        *,
        channels: int = 3,
        dropout: float = 0.1,
        hard: bool = False,
    ) -> None:
        check_int("max_input_frames", max_input_frames, low=1)
        check_int("max_output_frames", max_output_frames, low=1)
        check_int("min_output_frames", min_output_frames, low=1, high=max_output_frames)
        super().__init__(
            max_input_frames, max_output_frames, hidden_dim, num_layers, num_heads, channels, dropout, hard
        )
        self.min_output_frames = min_output_frames

    def spans(self, scores: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        scores, held = scores.detach(), exists.sum(1)
        expected = torch.where(exists, scores.sigmoid(), 0).sum(1).round().nan_to_num(0).long()
        count = expected.clamp(self.min_output_frames, self.queries.shape[0]).minimum(held)
        # the first frame always begins a piece; a frame that does not exist never does
        first = exists & (exists.cumsum(1) == 1)
        begin = scores.nan_to_num(nan=torch.finfo(scores.dtype).max).masked_fill(first, torch.inf)
        begin = begin.masked_fill(~exists, -torch.inf)
        order = begin.sort(dim=1, descending=True, stable=True).indices
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        begins = (rank < count[:, None]) & exists
        return begins.cumsum(1) - 1, count
