"""Tiny random models of every family and prompts for them, built by hand: no tokenizer, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 200
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO, AUDIO_START, AUDIO_END, PAD = 190, 191, 192, 193, 194, 195, 196, 0
SEPARATOR, OPEN, CLOSE = 180, 181, 182

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_PATCHES = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 4,
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
SIDE = 4  # tokens along each axis of a frame

Model, Inputs = Any, dict[str, Any]


def words(count: int, draw: torch.Generator) -> Tensor:
    return torch.randint(10, 180, (count,), generator=draw)


def stamp(frame: int) -> Tensor:
    """A time as text, three tokens of which the middle one differs."""
    return torch.tensor([OPEN, 100 + frame % 50, CLOSE])


def padded(rows: list[Tensor], left: bool) -> Inputs:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def drifting(frames: int, rows: int, dim: int, draw: torch.Generator) -> Tensor:
    """Patches that change little from frame to frame, so that memories have something to choose."""
    first = torch.randn(1, rows, dim, generator=draw)
    return (first + 0.3 * torch.randn(frames, rows, dim, generator=draw).cumsum(0)).reshape(frames * rows, dim)


def one_run(frames: int, tokens: int, before: int, draw: torch.Generator) -> Tensor:
    start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
    return torch.cat([words(before, draw), start, torch.full((frames * tokens,), VIDEO), end, words(5, draw)])


def marked_frames(frames: int, tokens: int, before: int, draw: torch.Generator) -> Tensor:
    parts = [words(before, draw)]
    for f in range(frames):
        run = [torch.tensor([VISION_START]), torch.full((tokens,), VIDEO), torch.tensor([VISION_END])]
        parts += [stamp(f), *run]
    return torch.cat([*parts, words(5, draw)])


def patch_rows(T: int, B: int, left: bool, draw: torch.Generator, layout: Callable[..., Tensor]) -> Inputs:
    """Prompts for Qwen: rows of 4 × 4 tokens, three frames more in each further row."""
    frames = [T + 3 * b for b in range(B)]
    rows = [layout(t, SIDE**2, 4 + 2 * b, draw) for b, t in enumerate(frames)]
    return padded(rows, left) | {
        "pixel_values_videos": torch.cat([drifting(t, 4 * SIDE**2, 3 * 2 * 16, draw) for t in frames]),
        "video_grid_thw": torch.tensor([[t, 2 * SIDE, 2 * SIDE] for t in frames]),
    }


def with_types(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == VIDEO).int() * 2 + (ids == IMAGE).int()}


def qwen2_vl(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE, "rope_scaling": _MROPE},
        vision_config={**_PATCHES, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, **_IDS,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config), with_types(patch_rows(T, B, left, draw, one_run))


def qwen2_5_vl(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE, "rope_scaling": _MROPE},
        vision_config={
            **_PATCHES, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        }, **_IDS,
    )  # fmt: skip
    inputs = with_types(patch_rows(T, B, left, draw, one_run)) | {"second_per_grid_ts": torch.full((B,), 1.0)}
    return transformers.Qwen2_5_VLForConditionalGeneration(config), inputs


def _deepstack(**more: Any) -> dict[str, Any]:
    return {
        **_PATCHES, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 64,
        **more,
    }  # fmt: skip


_INTERLEAVED = {**_MROPE, "mrope_interleaved": True}


def qwen3_vl(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _INTERLEAVED, "rope_scaling": _INTERLEAVED},
        vision_config=_deepstack(deepstack_visual_indexes=[0, 1]), **_IDS,
    )  # fmt: skip
    inputs = with_types(patch_rows(T, B, left, draw, marked_frames))
    return transformers.Qwen3VLForConditionalGeneration(config), inputs


def qwen3_vl_moe(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            **_TEXT, **_EXPERTS, "head_dim": 8, "rope_parameters": _INTERLEAVED, "rope_scaling": _INTERLEAVED,
        },
        vision_config=_deepstack(deepstack_visual_indexes=[0, 1]), **_IDS,
    )  # fmt: skip
    inputs = with_types(patch_rows(T, B, left, draw, marked_frames))
    return transformers.Qwen3VLMoeForConditionalGeneration(config), inputs


def _linear_text(**more: Any) -> dict[str, Any]:
    rope = {**_INTERLEAVED, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    return {
        **_TEXT, "head_dim": 8, "rope_parameters": rope, "rope_scaling": rope, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"], **more,
    }  # fmt: skip


def qwen3_5(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.Qwen3_5Config(text_config=_linear_text(), vision_config=_deepstack(), **_IDS)
    inputs = with_types(patch_rows(T, B, left, draw, marked_frames))
    return transformers.Qwen3_5ForConditionalGeneration(config), inputs


def qwen3_5_moe(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    text = _linear_text(
        moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=_deepstack(), **_IDS)
    inputs = with_types(patch_rows(T, B, left, draw, marked_frames))
    return transformers.Qwen3_5MoeForConditionalGeneration(config), inputs


def qwen2_5_omni_thinker(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    config = Qwen2_5OmniThinkerConfig(
        text_config={**_TEXT, "rope_parameters": _MROPE, "rope_scaling": _MROPE},
        vision_config={
            **_PATCHES, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
            "output_dim": 32, "n_window": 4,
        },
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO, audio_token_id=AUDIO,
        audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END, position_id_per_seconds=25, seconds_per_chunk=2,
        **_IDS,
    )  # fmt: skip
    inputs = patch_rows(T, B, left, draw, one_run) | {"video_second_per_grid": torch.full((B,), 1.0)}
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), inputs


def qwen3_omni_moe_thinker(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    config = Qwen3OmniMoeThinkerConfig(
        text_config={
            **_TEXT, **_EXPERTS, "head_dim": 8, "rope_parameters": _INTERLEAVED, "rope_scaling": _INTERLEAVED,
        },
        vision_config=_deepstack(deepstack_visual_indexes=[0, 1]),
        audio_config={
            "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
            "output_dim": 32, "n_window": 4, "downsample_hidden_size": 8,
        },
        audio_token_id=AUDIO, audio_start_token_id=AUDIO_START, audio_end_token_id=AUDIO_END,
        position_id_per_seconds=25, **_IDS,
    )  # fmt: skip
    inputs = patch_rows(T, B, left, draw, one_run) | {"video_second_per_grid": torch.full((B,), 1.0)}
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config), inputs


def video_llama_3(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.VideoLlama3Config(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    merge, pixels, grids, rows, masks = 2, [], [], [], []
    for b in range(B):
        t = T + 3 * b
        grids.append([t, SIDE * merge, SIDE * merge])
        pixels.append(drifting(t, (SIDE * merge) ** 2, 3 * 16, draw))
        changed = torch.rand(t, SIDE**2, generator=draw) < 0.7
        changed[0] = changed[:, 0] = True
        masks.append(changed.flatten())
        parts = [words(4, draw)]
        for f in range(t):
            separator = torch.full((int(f > 0),), SEPARATOR)
            parts += [separator, stamp(f), torch.full((int(changed[f].sum()),), VIDEO)]
        rows.append(torch.cat([*parts, words(5, draw)]))
    return transformers.VideoLlama3ForConditionalGeneration(config), padded(rows, left) | {
        "pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids),
        "video_merge_sizes": torch.tensor([merge] * B), "video_compression_mask": torch.cat(masks),
    }  # fmt: skip


def _pictures(T: int, B: int, size: int, draw: torch.Generator) -> Tensor:
    first = torch.randn(B, 1, 3, size, size, generator=draw)
    return first + 0.2 * torch.randn(B, T, 3, size, size, generator=draw).cumsum(1)


def llava_onevision(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    size = 4 * SIDE * 2
    config = transformers.LlavaOnevisionConfig(
        vision_config={**_SIGLIP, "image_size": size}, text_config={**_TEXT, "model_type": "qwen2"},
        image_token_index=IMAGE, video_token_index=VIDEO, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    run = torch.full((T * SIDE**2 + 1,), VIDEO)
    rows = [torch.cat([words(4 + 2 * b, draw), run, words(5, draw)]) for b in range(B)]
    inputs = padded(rows, left) | {"pixel_values_videos": _pictures(T, B, size, draw)}
    return transformers.LlavaOnevisionForConditionalGeneration(config), inputs


def llava_next_video(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    size = 4 * SIDE * 2
    config = transformers.LlavaNextVideoConfig(
        vision_config={**_SIGLIP, "image_size": size}, text_config={**_TEXT, "model_type": "llama"},
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-1,
        vision_feature_select_strategy="full", spatial_pool_mode="average", spatial_pool_stride=2,
    )  # fmt: skip
    run = torch.full((T * SIDE**2,), VIDEO)
    rows = [torch.cat([words(4 + 2 * b, draw), run, words(5, draw)]) for b in range(B)]
    inputs = padded(rows, left) | {"pixel_values_videos": _pictures(T, B, size, draw)}
    return transformers.LlavaNextVideoForConditionalGeneration(config), inputs


def _stamped_pictures(T: int, B: int, left: bool, draw: torch.Generator) -> Inputs:
    rows = []
    for b in range(B):
        frames = [part for f in range(T) for part in (stamp(f), torch.full((SIDE**2,), IMAGE))]
        rows.append(torch.cat([words(4 + 2 * b, draw), *frames, words(5, draw)]))
    return padded(rows, left) | {"pixel_values": _pictures(T, B, 4 * SIDE, draw).flatten(0, 1)}


def llava(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.LlavaConfig(
        vision_config={**_SIGLIP, "image_size": 4 * SIDE}, text_config={**_TEXT, "model_type": "llama"},
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), _stamped_pictures(T, B, left, draw)


def vipllava(T: int, B: int, left: bool, draw: torch.Generator) -> tuple[Model, Inputs]:
    config = transformers.VipLlavaConfig(
        vision_config={**_SIGLIP, "model_type": "clip_vision_model", "image_size": 4 * SIDE},
        text_config={**_TEXT, "model_type": "llama"}, image_token_index=IMAGE, vision_feature_layers=[-2, 1],
    )  # fmt: skip
    return transformers.VipLlavaForConditionalGeneration(config), _stamped_pictures(T, B, left, draw)


FAMILIES: dict[str, Callable[..., tuple[Model, Inputs]]] = {
    make.__name__: make
    for make in (
        video_llama_3, llava_onevision, llava_next_video, llava, vipllava, qwen2_vl, qwen2_5_vl, qwen2_5_omni_thinker,
        qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, qwen3_omni_moe_thinker,
    )
}  # fmt: skip


def tiny(family: str, T: int = 8, B: int = 1, left: bool = True, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """A model of a family in evaluation mode and inputs for it: B videos of T, T + 3, … frames (pictures: all of T)."""
    torch.manual_seed(seed)
    model, inputs = FAMILIES[family](T, B, left, torch.Generator().manual_seed(seed))
    return model.eval(), inputs
