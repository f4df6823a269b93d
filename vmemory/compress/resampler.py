"""Condense a clip to a fixed number of frames with learned queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vmemory.compress.video import CompressedFrames, FrameEncoder, check_rate, check_video, mix, pick, shares, wide
from vmemory.ops._checks import check_int


class QueryResampler(nn.Module):
    """A transformer over the frames with queries that each attend to one span of the clip.

    Subclasses define the spans. Spans are disjoint and in time order, and so are the output frames.

    Args:
        frames: Most frames a clip may have.
        queries: Number of output frames.
        hidden_dim, num_layers, num_heads, dropout: Of the transformer; `hidden_dim` is a multiple of `num_heads`.
        channels: Channels C of a frame.
        hard: Return the frame with the largest share instead of the weighted mean, with a straight-through gradient.
    """

    def __init__(
        self, frames: int, queries: int, hidden_dim: int, num_layers: int, num_heads: int, channels: int,
        dropout: float, hard: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        check_int("hidden_dim", hidden_dim, low=1)
        check_int("num_layers", num_layers, low=0)
        check_int("num_heads", num_heads, low=1)
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim: expected a multiple of num_heads ({num_heads}), got {hidden_dim}")
        check_rate("dropout", dropout)
        self.frames, self.channels, self.hard = frames, channels, bool(hard)
        self.encoder = FrameEncoder(hidden_dim, channels)
        self.position = nn.Parameter(torch.empty(frames, hidden_dim))
        self.queries = nn.Parameter(torch.empty(queries, hidden_dim))
        layers = [
            nn.TransformerEncoderLayer(
                hidden_dim, num_heads, 4 * hidden_dim, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(hidden_dim)
        self.key = nn.Linear(hidden_dim, hidden_dim)
        self.scorer = nn.Linear(hidden_dim, 1)
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.queries, std=0.02)

    def count(self, frames: int) -> int:
        """Return the output length K, the same for every clip; `mask` marks the frames among them."""
        check_int("frames", frames, low=1, high=self.frames)
        return self.queries.shape[0]

    def spans(self, scores: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """Return the span of each frame `[B, T]` int64 and the number of spans `[B]` int64; no span is empty."""
        raise NotImplementedError

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> CompressedFrames:
        """Return one frame per query. No host synchronisation; deterministic in evaluation.

        Args:
            frames: `[B, T, C, H, W]`, float64, float32, float16 or bfloat16, of any size.
            mask: `[B, T]` bool, True where a frame exists. The content of other frames is not read.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        frames, exists = check_video(frames, mask, self.channels, self.frames)
        features = self._context(self.encoder(frames), exists)
        scores = wide(self.scorer(features).squeeze(-1))
        span, count = self.spans(scores, exists)
        place = torch.arange(self.queries.shape[0], device=frames.device)
        allowed = exists[:, None] & (span[:, None] == place[:, None])
        match = wide(torch.einsum("kd,btd->bkt", self.queries, self.key(features))) / math.sqrt(features.shape[-1])
        weights = shares(match + scores[:, None], allowed)
        there = place < count[:, None]
        indices = torch.where(there, weights.detach().argmax(-1), -1)
        return CompressedFrames(
            frames=pick(frames, weights, indices) if self.hard else mix(frames, weights),
            mask=there,
            indices=indices,
            weights=weights,
            scores=scores.masked_fill(~exists, -torch.inf),
        )

    def _context(self, features: Tensor, exists: Tensor) -> Tensor:
        hidden = features + self.position[: features.shape[1]]
        # attention over nothing is NaN, so a clip without frames attends to its zeros
        unread = ~exists & exists.any(1, keepdim=True)
        # torch's attention refuses an empty batch
        for layer in self.layers if features.shape[0] else ():
            hidden = layer(hidden, src_key_padding_mask=unread)
        return self.norm(hidden)


class FrameResampler(QueryResampler):
    """Condense a clip to `output_frames` frames; query k attends to the k-th of equal spans of the clip.

    Args:
        input_frames: Most frames a clip may have.
        output_frames: Number of output frames. A clip of fewer frames is returned whole, with padding.
        hidden_dim, num_layers, num_heads, dropout: Of the transformer; `hidden_dim` is a multiple of `num_heads`.
        channels: Channels C of a frame.
        hard: Return the frame with the largest share of each span, unchanged, instead of the span's weighted mean.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: the "basic" compressor of the TempMe and STOP integration (parameters `tempme_input_frames`,
    `tempme_output_frames`, `tempme_hidden_dim`, `tempme_num_layers`).
    """

    def __init__(
        self,
        input_frames: int = 32,
        output_frames: int = 12,
        hidden_dim: int = 512,
        num_layers: int = 3,
        num_heads: int = 8,
        *,
        channels: int = 3,
        dropout: float = 0.1,
        hard: bool = False,
    ) -> None:
        check_int("input_frames", input_frames, low=1)
        check_int("output_frames", output_frames, low=1)
        super().__init__(input_frames, output_frames, hidden_dim, num_layers, num_heads, channels, dropout, hard)

    def spans(self, scores: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        held = exists.sum(1)
        count = held.clamp_max(self.queries.shape[0])
        rank = exists.cumsum(1) - 1
        return rank * count[:, None] // held.clamp_min(1)[:, None], count
