"""Qwen2-VL: one run of placeholders per video, three-row positions whose gaps are real time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vmemory.models.adapter import Inputs, known_arguments
from vmemory.models.families import PatchRowAdapter
from vmemory.models.registry import register_adapter


@register_adapter("qwen2_vl")
class Qwen2VL(PatchRowAdapter):
    """Adapter whose memory frames are pairs of video frames (`temporal_patch_size` is 2)."""

    uses_mrope = True

    def temporal_position(self, model: Any, frame: int, seconds: float) -> int:
        return frame

    def positions(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        locate = self.feature_module(model).get_rope_index
        located: tuple[Tensor, Tensor] = locate(**known_arguments(locate, inputs))
        return located
