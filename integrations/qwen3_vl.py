"""Qwen3-VL and Qwen3.5: times as text before frames. Qwen3-VL's deepstack features are extra channels of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from vmemory.integrations.qwen2_vl import Qwen2VL
from vmemory.models.registry import register_adapter


@register_adapter("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
class Qwen3VL(Qwen2VL):
    """Adapter with vision marks around every frame; gaps in the positions are closed, because text states the time."""

    frame_text = True
    mean = std = (0.5, 0.5, 0.5)

    def frame_time(self, first: float, last: float) -> float:
        return (first + last) / 2

    def video_text(self, frames: Sequence[tuple[float, int]], token: str, tail: int) -> str:
        # chat templates add the marks of the whole video
        return "".join(f"<{t:.1f} seconds><|vision_start|>{token * n}<|vision_end|>" for t, n in frames)
