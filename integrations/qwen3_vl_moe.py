"""Qwen3-VL with experts: videos as in Qwen3-VL."""

from __future__ import annotations

from vmemory.integrations.qwen3_vl import Qwen3VL
from vmemory.models.registry import register_adapter


@register_adapter("qwen3_vl_moe")
class Qwen3VLMoe(Qwen3VL):
    """Experts change nothing about its videos."""
