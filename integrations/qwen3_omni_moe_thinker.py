"""Qwen3-Omni's thinker: deepstack features as in Qwen3-VL, one run of placeholders and sound as in Qwen2.5-Omni."""

from __future__ import annotations

from vmemory.integrations.qwen2_5_omni_thinker import Qwen25OmniThinker
from vmemory.models.registry import register_adapter


@register_adapter("qwen3_omni_moe_thinker")
class Qwen3OmniThinker(Qwen25OmniThinker):
    """Attach to `model.thinker`."""
