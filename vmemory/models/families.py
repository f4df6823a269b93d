"""Base adapters: pixels as rows of patches, or square frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vmemory.models.adapter import Adapter, Clip, Encoded, Inputs, as_pooling, known_arguments
from vmemory.models.pixels import CLIP_MEAN, CLIP_STD, normalisation, patch_rows, scaled, size_for, square_size

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


class PatchRowAdapter(Adapter):
    """Adapter of families whose pixels are rows of patches `[T·h·w, …]` with `video_grid_thw`: Qwen, VideoLLaMA3."""

    side = 2  # patches per token along each axis of the frames that `preprocess` writes
    seconds_input = ""  # name of the input with each video's seconds between two frames
    mean, std = CLIP_MEAN, CLIP_STD

    def patch_size(self, model: Any) -> int:
        """Return the pixels along each axis of a patch."""
        return int(model.config.vision_config.patch_size)

    def temporal_patch_size(self, model: Any) -> int:
        return int(getattr(model.config.vision_config, "temporal_patch_size", 1))

    def frame_size(self, model: nn.Module, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        return size_for(size, self.patch_size(model) * self.side, tokens)

    def size_of(self, model: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        unit = self.patch_size(model) * self.side
        return grid[0] * unit, grid[1] * unit

    def preprocess(self, model: nn.Module, frames: Tensor, processor: object, size: tuple[int, int]) -> Inputs:
        mean, std = normalisation(processor, self.mean, self.std)
        pixels = scaled(frames, size, mean, std)
        rows, grid = patch_rows(pixels, self.patch_size(model), self.side, self.temporal_patch_size(model))
        return {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([grid])}

    def encode(self, model: nn.Module, inputs: Inputs) -> Encoded:
        module, clips = self.feature_module(model), []
        output = module.get_video_features(**known_arguments(module.get_video_features, inputs), return_dict=True)
        merges, steps = inputs.get("video_merge_sizes"), inputs.get(self.seconds_input)
        deep = getattr(output, "deepstack_features", None) or []
        for video, (t, h, w) in enumerate(inputs["video_grid_thw"].tolist()):
            main = output.pooler_output[video]
            tokens = torch.cat([main, *(layer[video] for layer in deep)], -1) if deep else main
            m = int(module.visual.spatial_merge_size if merges is None else merges[video])
            time = None if steps is None else torch.arange(t, dtype=torch.float64) * float(steps[video])
            clips.append(Clip(tokens.reshape(t, h // m, w // m, -1), main.shape[-1], time=time))
        return Encoded(clips, output)

    def iter_chunks(self, model: nn.Module, inputs: Inputs, chunk: int) -> Iterator[Iterator[Inputs]]:
        grids = inputs["video_grid_thw"]
        rows = inputs["pixel_values_videos"].split(grids.prod(-1).tolist())
        for video in range(len(grids)):
            yield self._pieces(inputs, video, rows[video], chunk)

    def _pieces(self, inputs: Inputs, video: int, rows: Tensor, chunk: int) -> Iterator[Inputs]:
        t, h, w = inputs["video_grid_thw"][video].tolist()
        for first in range(0, t, chunk):
            stop = min(first + chunk, t)
            grid = inputs["video_grid_thw"].new_tensor([[stop - first, h, w]])
            yield {"pixel_values_videos": rows[first * h * w : stop * h * w], "video_grid_thw": grid}

    def pack(self, output: Any, tokens: Sequence[Tensor]) -> ModelOutput:
        deep = getattr(output, "deepstack_features", None) or []
        if not deep:
            return as_pooling(list(tokens))
        parts = [t.split(output.pooler_output[0].shape[-1], -1) for t in tokens]
        layers = [[part[1 + layer] for part in parts] for layer in range(len(deep))]
        return type(output)(pooler_output=[part[0] for part in parts], deepstack_features=layers)


class SquareFrameAdapter(Adapter):
    """Adapter of families with `pixel_values_videos [B, T, 3, h, w]` and square token grids: LLaVA."""

    newline = 0  # rows after each video's frames in the tower's output
    mean, std = CLIP_MEAN, CLIP_STD

    def frame_size(self, model: nn.Module, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        return square_size(model)

    def preprocess(self, model: nn.Module, frames: Tensor, processor: object, size: tuple[int, int]) -> Inputs:
        return {"pixel_values_videos": scaled(frames, size, *normalisation(processor, self.mean, self.std))[None]}

    def encode(self, model: nn.Module, inputs: Inputs) -> Encoded:
        get = self.feature_module(model).get_video_features
        output = get(**known_arguments(get, inputs), return_dict=True)
        T, clips = inputs["pixel_values_videos"].shape[1], []
        for tokens in output.pooler_output:
            tokens = tokens.reshape(-1, tokens.shape[-1])
            body = tokens[: len(tokens) - self.newline]
            side = round((len(body) // T) ** 0.5)
            tail = tokens[len(body) :] if self.newline else None
            clips.append(Clip(body.reshape(T, side, side, -1), tokens.shape[-1], tail=tail))
        return Encoded(clips, output)

    def iter_chunks(self, model: nn.Module, inputs: Inputs, chunk: int) -> Iterator[Iterator[Inputs]]:
        for video in inputs["pixel_values_videos"]:
            # the towers view the pixels as rows, so they must be contiguous
            yield (
                {**inputs, "pixel_values_videos": video[None, first : first + chunk].contiguous()}
                for first in range(0, len(video), chunk)
            )
