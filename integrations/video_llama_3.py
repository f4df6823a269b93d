"""VideoLLaMA3 of transformers: tokens pruned by pixel difference, times as text before frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Size, Tensor, nn

from vmemory.models.adapter import Encoded, Inputs
from vmemory.models.families import PatchRowAdapter
from vmemory.models.registry import register_adapter


@register_adapter("video_llama_3")
class VideoLlama3(PatchRowAdapter):
    """Adapter with `Time 0.0s:` before a frame's tokens that differ from the previous frame; plain positions."""

    frame_text = True
    mean = std = (0.5, 0.5, 0.5)

    def preprocess(self, model: nn.Module, frames: Tensor, processor: object, size: tuple[int, int]) -> Inputs:
        inputs = super().preprocess(model, frames, processor, size)
        return {**inputs, "video_merge_sizes": torch.tensor([self.side])}

    def video_text(self, frames: Sequence[tuple[float, int]], token: str, tail: int) -> str:
        return ",".join(f"Time {t:.1f}s:{token * n}" for t, n in frames)

    def encode(self, model: nn.Module, inputs: Inputs) -> Encoded:
        encoded = super().encode(model, inputs)
        mask = inputs.get("video_compression_mask")
        if mask is not None:
            grids = [clip.frames.shape[:3] for clip in encoded.clips]
            for clip, cells, grid in zip(encoded.clips, _split(mask, grids), grids, strict=True):
                clip.mask = cells.reshape(grid)
        return encoded

    def _pieces(self, inputs: Inputs, video: int, rows: Tensor, chunk: int) -> Iterator[Inputs]:
        merges, mask = inputs["video_merge_sizes"], inputs.get("video_compression_mask")
        tokens = inputs["video_grid_thw"].prod(-1) // merges**2
        left = None if mask is None else mask.split(tokens.tolist())[video]
        for piece in super()._pieces(inputs, video, rows, chunk):
            piece["video_merge_sizes"] = merges[video : video + 1]
            if left is not None:
                count = int(piece["video_grid_thw"].prod()) // int(merges[video]) ** 2
                piece["video_compression_mask"], left = left[:count], left[count:]
            yield piece


def _split(mask: Tensor, grids: list[Size]) -> tuple[Tensor, ...]:
    return mask.bool().split([grid.numel() for grid in grids])
