"""Qwen2.5-VL: like Qwen2-VL, with seconds in the positions."""

from __future__ import annotations

from typing import Any

from vmemory.integrations.qwen2_vl import Qwen2VL
from vmemory.models.registry import register_adapter


@register_adapter("qwen2_5_vl")
class Qwen25VL(Qwen2VL):
    """Adapter whose positions count in seconds."""

    seconds_input = "second_per_grid_ts"

    def temporal_position(self, model: Any, frame: int, seconds: float) -> int:
        return int(seconds * model.config.vision_config.tokens_per_second)
