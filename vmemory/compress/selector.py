"""Select frames by a learned score, with a gradient through the selection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmemory.compress.video import CompressedFrames, FrameEncoder, check_rate, check_video, pick, shares, wide
from vmemory.ops._checks import check_int
from vmemory.ops.select_tokens import select_tokens


class FrameSelector(nn.Module):
    """Keep the frames with the largest learned scores, unchanged and in time order.

    The score of a frame depends on the frame and on its difference from the previous frame. The forward pass is a hard
    top-k. The backward pass (straight-through) treats each kept position as a softmax over its frame and the dropped
    frames, so the score of a frame that would have lowered the loss grows. If no frame is dropped, the gradient of the
    scorer is 0.

    Args:
        compression_ratio: Share of the frames kept, in (0, 1]: max(1, floor(T · ratio)) of them.
        hidden_dim: Width of the scorer.
        output_frames: Exact number of output frames for any T, padded if fewer exist. Overrides the ratio. For models
            of a fixed length (STOP: 12).
        channels: Channels C of a frame.
        dropout: Dropout rate in the scorer, during training.
        temperature: Temperature of the backward softmax.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: the "simple" compressor of the TempMe and STOP integration (parameters `tempme_compression_ratio`,
    `tempme_hidden_dim`), which had no gradient through the selection; straight-through estimation as in Bengio et al.
    (arXiv 1308.3432).
    """

    def __init__(
        self,
        compression_ratio: float = 0.75,
        hidden_dim: int = 256,
        *,
        output_frames: int | None = None,
        channels: int = 3,
        dropout: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("compression_ratio", compression_ratio), ("temperature", temperature)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 < compression_ratio <= 1:
            raise ValueError(f"compression_ratio: expected a number in (0, 1], got {compression_ratio}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        check_int("hidden_dim", hidden_dim, low=1)
        if output_frames is not None:
            check_int("output_frames", output_frames, low=1)
        check_rate("dropout", dropout)
        self.compression_ratio, self.output_frames = compression_ratio, output_frames
        self.channels, self.temperature = channels, temperature
        self.encoder = FrameEncoder(hidden_dim, channels)
        self.scorer = nn.Sequential(
            nn.LayerNorm(2 * hidden_dim),
            nn.Linear(2 * hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, 1),
        )

    def count(self, frames: int) -> int:
        """Return K, the number of frames kept of a clip of `frames` frames."""
        check_int("frames", frames, low=1)
        return self.output_frames or max(1, int(frames * self.compression_ratio))

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> CompressedFrames:
        """Return the `count(T)` frames with the largest scores. No host synchronisation; deterministic in evaluation.

        Args:
            frames: `[B, T, C, H, W]`, float64, float32, float16 or bfloat16, of any size.
            mask: `[B, T]` bool, True where a frame exists. Other frames are never kept, and their content is not read.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        frames, exists = check_video(frames, mask, self.channels)
        features = self.encoder(frames)
        news = features - torch.cat([features.new_zeros(features[:, :1].shape), features[:, :-1]], 1)
        scores = wide(self.scorer(torch.cat([features, news], -1)).squeeze(-1))
        K = self.count(frames.shape[1])
        indices = select_tokens(scores, [K], torch.where(exists, 0, -1)).indices
        weights = self._weights(scores, exists, indices)
        return CompressedFrames(
            frames=pick(frames, weights, indices),
            mask=indices >= 0,
            indices=indices,
            weights=weights,
            scores=scores.masked_fill(~exists, -torch.inf),
        )

    def _weights(self, scores: Tensor, exists: Tensor, indices: Tensor) -> Tensor:
        """Return, for each kept position, the softmax over its own frame and the dropped frames."""
        place = torch.arange(scores.shape[1], device=scores.device)
        own = indices[:, :, None] == place
        left = exists & ~own.any(1)
        allowed = (own | left[:, None]) & (indices >= 0)[:, :, None]
        return shares((scores / self.temperature)[:, None].expand(-1, indices.shape[1], -1), allowed)
