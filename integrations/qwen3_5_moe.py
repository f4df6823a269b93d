"""Qwen3.5 with experts: videos as in Qwen3.5."""

from __future__ import annotations

from vmemory.integrations.qwen3_5 import Qwen35
from vmemory.models.registry import register_adapter


@register_adapter("qwen3_5_moe")
class Qwen35Moe(Qwen35):
    """Experts change nothing about its videos."""
