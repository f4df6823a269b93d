"""TempMe inside a CLIP tower: the recorded run, its schedule, independence of videos, padding, training, no trace."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vmemory.compress import TempMe, tempme_schedule
from vmemory.testing import assert_within_budget, random_tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

RUN = "vit_default_8-9-10_2-2-3_r2_30-10"
SMALL: dict[str, Any] = {
    "frames": 6,
    "merge_layers": "2-3",
    "merge_frames": "3-2",
    "r": 2,
    "proportions": "30-10",
}


def vision(layers: int = 5, **config: Any) -> nn.Module:
    """A random vision tower with projection, 17 tokens a frame."""
    arguments = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 24,
        "initializer_factor": 4.0,
    }
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**(arguments | config))
    return transformers.CLIPVisionModelWithProjection(config).eval()


def videos(B: int = 2, T: int = 6, size: int = 16, **kind: Any) -> Tensor:
    return random_tensor(B, T, 3, size, size, **kind)


@pytest.fixture
def recorded(golden: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = golden / "tempme" / RUN
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def recorded_tower(run: dict[str, Tensor], about: dict[str, Any]) -> TempMe:
    """The tower of a recorded run: the original's packed projections split, their low-rank updates added."""
    width, heads = run["w.ln_pre.weight"].shape[0], about["heads"]
    model = vision(
        12, hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, image_size=28, projection_dim=16
    )
    block = "w.transformer.resblocks"
    weights = {
        "embeddings.class_embedding": run["w.class_embedding"],
        "embeddings.patch_embedding.weight": run["w.conv1.weight"],
        "embeddings.position_embedding.weight": run["w.positional_embedding"],
    }
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(12):
        ours = f"encoder.layers.{i}"
        for theirs, name in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            names[f"transformer.resblocks.{i}.{theirs}"] = f"{ours}.{name}"
        attention = f"{block}.{i}.attn"
        packed = run[f"{attention}.in_proj_weight"].double()
        packed = packed + run[f"{attention}.TVPt_LoRA_b"].double() @ run[f"{attention}.TVPt_LoRA_a"].double()
        for j, kind in enumerate("qkv"):
            weights[f"{ours}.self_attn.{kind}_proj.weight"] = packed.chunk(3)[j]
            weights[f"{ours}.self_attn.{kind}_proj.bias"] = run[f"{attention}.in_proj_bias"].chunk(3)[j]
    for theirs, name in names.items():
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = run[f"w.{theirs}.{kind}"]
    prefix = "vision_model."
    weights = {prefix + name: value for name, value in weights.items()}
    model.load_state_dict(weights | {"visual_projection.weight": run["w.proj"].T})
    merging = TempMe(model, about["n_frames"])
    for layer, position in merging.positions.items():
        position.data = run[f"{block}.{layer}.TVPt_Video_Positional_embedding"].reshape(position.shape).clone()
    return merging


@torch.no_grad()
def test_merges_as_the_original(recorded):
    """Behind every layer: the same sizes, so the same merges, and the same tokens but for rounding."""
    run, about = recorded
    merging = recorded_tower(run, about)
    pixels = run["video"].unflatten(0, (about["b"], about["n_frames"]))
    wide = list(copy.deepcopy(merging).double().layers(pixels.double()))
    for i, clips in enumerate(merging.layers(pixels)):
        assert list(clips.tokens.shape) == about["schedule"][i]["out_shape"]
        assert torch.equal(clips.size, run[f"block{i}_size"])
        assert_within_budget(clips.tokens, run[f"block{i}_out"], wide[i].tokens, f"layer {i}")
    out = merging(pixels)
    assert out.tokens.shape == (2, 97, 32)
    assert torch.equal(out.tokens, clips.tokens)
