"""LLaVA with frames as pictures: the pictures of a row are the frames of one video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmemory.models.adapter import Adapter, Clip, Encoded, Inputs, as_pooling, known_arguments, one_tensor
from vmemory.models.pixels import CLIP_MEAN, CLIP_STD, normalisation, scaled, square_size
from vmemory.models.registry import register_adapter


@register_adapter("llava", "vipllava")
class Llava(Adapter):
    """Adapter with one run of placeholders per picture, text between the runs, and plain positions."""

    modality = "image"
    pixels = "pixel_values"
    frame_text = True

    def frame_size(self, model: nn.Module, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        return square_size(model)

    def preprocess(self, model: nn.Module, frames: Tensor, processor: object, size: tuple[int, int]) -> Inputs:
        return {"pixel_values": scaled(frames, size, *normalisation(processor, CLIP_MEAN, CLIP_STD))}

    def video_text(self, frames: Sequence[tuple[float, int]], token: str, tail: int) -> str:
        return "\n".join(token * count for _, count in frames)

    def encode(self, model: nn.Module, inputs: Inputs) -> Encoded:
        get = self.feature_module(model).get_image_features
        output = get(**known_arguments(get, inputs), return_dict=True)
        tokens = torch.stack(list(output.pooler_output))
        N, C = tokens.shape[1:]
        side = round(N**0.5)
        rows = tokens.reshape(len(tokens), side, side, C).split(self._pictures(model, inputs))
        return Encoded([Clip(row, C) for row in rows if len(row)], output)

    def pack(self, output: Any, tokens: Sequence[Tensor]) -> Any:
        # VipLlava needs one tensor
        return one_tensor(tokens) if torch.is_tensor(output.pooler_output) else as_pooling(list(tokens))

    def _pictures(self, model: nn.Module, inputs: Inputs) -> list[int]:
        """Return the number of pictures in each row of the prompt; without a prompt all belong to one video."""
        ids, total = inputs.get("input_ids"), len(inputs["pixel_values"])
        if ids is None:
            return [total]
        places = (ids == self.placeholder_id(model)).sum(-1)
        each = int(places.sum()) // max(total, 1)
        pictures: list[int] = (places // max(each, 1)).tolist()
        if sum(pictures) != total or bool((places % max(each, 1)).any()):
            raise ValueError(f"input_ids: expected places for {total} pictures, got {places.tolist()} in its rows")
        return pictures

    def iter_chunks(self, model: nn.Module, inputs: Inputs, chunk: int) -> Iterator[Iterator[Inputs]]:
        for row in inputs["pixel_values"].split(self._pictures(model, inputs)):
            if len(row):
                yield ({"pixel_values": row[first : first + chunk]} for first in range(0, len(row), chunk))
