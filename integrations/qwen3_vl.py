"""Qwen3-VL: times as text in front of frames, and deepstack features that ride behind the tokens."""

from __future__ import annotations

from vmemory.integrations.qwen2_vl import Qwen2VL
from vmemory.models.adapter import register_adapter


@register_adapter("qwen3_vl")
class Qwen3VL(Qwen2VL):
    """Every frame stands between its own vision marks; gaps in the positions are closed, since text tells the time."""

    frame_text = True
