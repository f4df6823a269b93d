"""LLaVA-NeXT-Video: one run of placeholders per video, square frames, plain positions."""

from __future__ import annotations

from vmemory.models.families import SquareFrameAdapter
from vmemory.models.registry import register_adapter


@register_adapter("llava_next_video")
class LlavaNextVideo(SquareFrameAdapter):
    """Adapter whose frames are the result of the model's own spatial pooling."""
