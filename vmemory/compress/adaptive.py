"""Condenses a clip to as many frames as its content asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.compress.resampler import QueryResampler
from vmemory.ops._checks import check_int


class AdaptiveFrameResampler(QueryResampler):
    """Cuts a clip where something new begins and condenses each piece to one frame.

    A learned score says how likely a frame is to begin something new. The sum of these likelihoods, within bounds, is
    how many frames come out; the frames with the largest scores begin the pieces; within a piece the score counts
    towards a frame's share, and so is trained. Add the sum of `scores.sigmoid()` to a loss to ask for fewer frames.

    Args:
        max_input_frames: Most frames a clip may have.
        min_output_frames: Fewest frames that come out of a clip that has as many.
        max_output_frames: Most frames that come out, and the length K of every output; equal to `min_output_frames`
            for models of a fixed length (STOP: 12).
        hidden_dim, num_layers, num_heads, dropout: Of the transformer; `hidden_dim` is a multiple of `num_heads`.
        channels: Channels C of a frame.
        hard: Show each piece's frame with the largest share, unchanged, instead of the weighted mean of the piece.

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
        # the first frame begins a piece whatever its score, a frame that does not exist never does
        first = exists & (exists.cumsum(1) == 1)
        begin = scores.nan_to_num(nan=torch.finfo(scores.dtype).max).masked_fill(first, torch.inf)
        begin = begin.masked_fill(~exists, -torch.inf)
        order = begin.sort(dim=1, descending=True, stable=True).indices
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        begins = (rank < count[:, None]) & exists
        return begins.cumsum(1) - 1, count
