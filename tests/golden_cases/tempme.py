"""TempMe: its matches, its schedule, and a whole tower, layer by layer."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from tests.clip_models import vision
from tests.recordings import Case
from vmemory.compress import TempMe, tempme_schedule
from vmemory.ops import bipartite_match, token_merge
from vmemory.testing import assert_within_budget


def check(case: Case) -> None:
    if case.holds("metric", "source", "x", "size", "y", "size_out"):
        check_match(case)
    elif case.holds("video", "w.conv1.weight"):
        check_tower(case)
    else:
        check_numbers(case)


def check_match(case: Case) -> None:
    run = case.tensors
    for impl in ("auto", "reference"):
        plan = bipartite_match(run["metric"], case.facts["r"], cls=case.facts["cls_num"], impl=impl)
        held = torch.zeros_like(run["source"]).scatter_(1, plan.place[:, None], 1.0)
        assert torch.equal(held, run["source"])
        actual = token_merge(run["x"], plan, run["size"], impl=impl)
        wide = token_merge(run["x"].double(), plan, run["size"].double(), impl="reference")
        assert_within_budget(actual.x, run["y"], wide.x)
        assert torch.equal(actual.size, run["size_out"])


SCHEDULE = re.compile(r"ViT-B/(\d+) (\d+)f r(\d+)")
EQUAL = re.compile(r"all-equal metric \(ties\), (tempme cls=|tome class_token)(\d*) r=(\d+)(?:: .*)?")


def check_numbers(case: Case) -> None:
    known = 0
    for key, recorded in case.facts.items():
        if named := SCHEDULE.fullmatch(key):
            patch, frames, r = map(int, named.groups())
            steps = tempme_schedule(len(recorded), (224 // patch) ** 2 + 1, frames, r=r)
            for step, (layer, merged, after, cls, clips) in zip(steps, recorded, strict=True):
                found = [step.cross, step.intra] if step.join > 1 else [step.intra]
                assert (found, step.tokens, step.cls, step.clips) == (merged, after, cls, clips), (
                    f"{key}, layer {layer}"
                )
        elif named := EQUAL.fullmatch(key):
            # with equal scores the originals' unstable sort happened to take the lowest rows but one, ours takes them
            kept, r = int(named[2] or 1), int(named[3])
            n = len(recorded) + r
            plan = bipartite_match(torch.ones(1, n, 4), r, cls=kept)
            merged = token_merge(torch.arange(float(n))[None, :, None], plan).x.flatten().tolist()
            unmerged = kept + (n - kept + 1) // 2 - r
            assert sorted(recorded[:unmerged]) == merged[:unmerged]
            assert merged == pytest.approx(recorded)
        else:
            continue
        known += 1
    if not known:
        case.skip()


def recorded_tower(case: Case) -> TempMe:
    """The tower of a recorded run: the original's packed projections split, their low-rank updates added."""
    run, facts = case.tensors, case.facts
    width, layers, side = run["w.ln_pre.weight"].shape[0], len(facts["schedule"]), run["video"].shape[-1]
    model = vision(
        layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=facts["heads"], image_size=side,
        patch_size=run["w.conv1.weight"].shape[-1], projection_dim=run["w.proj"].shape[1],
    )  # fmt: skip
    block = "w.transformer.resblocks"
    weights = {
        "embeddings.class_embedding": run["w.class_embedding"],
        "embeddings.patch_embedding.weight": run["w.conv1.weight"],
        "embeddings.position_embedding.weight": run["w.positional_embedding"],
    }
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(layers):
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
    merging = TempMe(
        model, facts["n_frames"], merge_layers=facts["merge_layer"], merge_frames=facts["merge_frame_num"],
        r=facts["tome_r"], proportions=facts["merge_token_proportion_percent"], positions=bool(facts["frame_pos"]),
        proportional=facts["prop_attn"],
    )  # fmt: skip
    for layer, position in merging.positions.items():
        position.data = run[f"{block}.{layer}.TVPt_Video_Positional_embedding"].reshape(position.shape).clone()
    return merging


@torch.no_grad()
def check_tower(case: Case) -> None:
    """Behind every layer: the same sizes, so the same merges, and the same tokens but for rounding."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    run, facts = case.tensors, case.facts
    merging = recorded_tower(case)
    pixels = run["video"].unflatten(0, (facts["b"], facts["n_frames"]))
    wide = list(copy.deepcopy(merging).double().layers(pixels.double()))
    for i, clips in enumerate(merging.layers(pixels)):
        assert list(clips.tokens.shape) == facts["schedule"][i]["out_shape"]
        assert torch.equal(clips.size, run[f"block{i}_size"])
        assert_within_budget(clips.tokens, run[f"block{i}_out"], wide[i].tokens, f"layer {i}")
    assert torch.equal(merging(pixels).tokens, clips.tokens)
