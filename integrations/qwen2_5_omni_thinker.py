"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: like Qwen2.5-VL, with sound in the prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vmemory.models.adapter import Inputs, known_arguments
from vmemory.models.families import PatchRowAdapter
from vmemory.models.registry import register_adapter


@register_adapter("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
class Qwen25OmniThinker(PatchRowAdapter):
    """Adapter of `model.thinker`; it generates text only, because speech generation needs the original prompt."""

    seconds_input = "video_second_per_grid"
    uses_mrope = True
    generates_audio = True

    def temporal_position(self, model: Any, frame: int, seconds: float) -> int:
        return int(seconds * model.config.position_id_per_seconds)

    def positions(self, model: Any, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        sounds = inputs.get("feature_attention_mask")
        if sounds is not None and inputs.get("audio_feature_lengths") is None:
            inputs = {**inputs, "audio_feature_lengths": sounds.sum(-1)}
        locate = model.get_rope_index
        known = known_arguments(
            locate, inputs, second_per_grids="video_second_per_grid", audio_seqlens="audio_feature_lengths"
        )
        located: tuple[Tensor, Tensor] = locate(**known)
        return located
