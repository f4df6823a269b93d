"""Qwen3.5: videos as in Qwen3-VL, without deepstack."""

from __future__ import annotations

from vmemory.integrations.qwen3_vl import Qwen3VL
from vmemory.models.registry import register_adapter


@register_adapter("qwen3_5")
class Qwen35(Qwen3VL):
    """Some layers attend linearly; which tokens come in is all the same to them."""
