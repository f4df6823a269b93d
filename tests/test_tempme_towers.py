"""TempMe around any CLIP tower: equal to it where nothing merges, trainable as it is, and without a trace in it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.clip_models import SMALL, OpenAICLIP, videos, vision
from vmemory.compress import TempMe
from vmemory.testing import assert_within_budget, random_tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NOTHING: dict[str, Any] = {"frames": 6, "merge_layers": "", "merge_frames": "", "r": 0}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


class LowRank(nn.Module):
    """A frozen linear layer and a low-rank update beside it, as adapters are put into a tower."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(random_tensor(rank, linear.in_features, seed=1) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_tower_where_nothing_merges(attention, dtype):
    model = vision()
    model.set_attn_implementation(attention)
    model.to(dtype)
    plain = model(videos().to(dtype).flatten(0, 1))
    out = TempMe(model, **NOTHING)(videos().to(dtype))
    assert torch.equal(out.frames.flatten(0, 1), plain.image_embeds)
    assert torch.equal(out.tokens.reshape(12, 17, 32), plain.last_hidden_state)
    assert torch.equal(out.source, torch.arange(102).expand(2, 102))
    assert out.size.eq(1).all()


@torch.no_grad()
def test_a_mask_changes_nothing_where_all_frames_exist():
    merging = TempMe(vision().double(), **NOTHING)
    pixels = videos().double()
    masked = merging(pixels, torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(masked.frames, merging(pixels).frames)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel", "vision_model"])
def test_takes_every_form_of_the_tower(kind):
    config = transformers.CLIPVisionConfig(**WIDTH, image_size=16, patch_size=4, projection_dim=24)
    torch.manual_seed(0)
    if kind == "CLIPModel":
        text = WIDTH | {"vocab_size": 9, "eos_token_id": 8, "bos_token_id": 7}
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=config.to_dict(), projection_dim=24)
        ).eval()
        wanted = model.get_image_features(videos().flatten(0, 1)).pooler_output
    else:
        model = transformers.CLIPVisionModel(config).eval()
        wanted = model(videos().flatten(0, 1)).pooler_output
        model = model if kind == "CLIPVisionModel" else getattr(model, "vision_model", model)
    assert torch.equal(TempMe(model, **NOTHING)(videos()).frames.flatten(0, 1), wanted)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "ViT-B/32"])
def test_refuses_what_is_no_clip_tower(model):
    with pytest.raises(TypeError, match="model: expected a CLIP model or its vision tower, got"):
        TempMe(model)


@torch.no_grad()
def test_openai_tower_equals_itself_where_nothing_merges():
    model = OpenAICLIP().double().eval()
    pixels = videos().double()
    for given in (model, model.visual):
        out = TempMe(given, **NOTHING)(pixels)
        torch.testing.assert_close(out.frames.flatten(0, 1), model.encode_image(pixels.flatten(0, 1)))
        torch.testing.assert_close(out.tokens.reshape(12, 17, 32), model.visual(pixels.flatten(0, 1)))


@torch.no_grad()
def test_openai_tower_merges_as_the_same_weights_in_hugging_faces():
    theirs = OpenAICLIP().double().eval()
    ours = vision(hidden_act="gelu").double()
    visual, names = theirs.visual, {"pre_layrnorm": theirs.visual.ln_pre, "post_layernorm": theirs.visual.ln_post}
    tower = ours.vision_model
    tower.embeddings.class_embedding.copy_(visual.class_embedding)
    tower.embeddings.patch_embedding.weight.copy_(visual.conv1.weight)
    tower.embeddings.position_embedding.weight.copy_(visual.positional_embedding)
    ours.visual_projection.weight.copy_(visual.proj.T)
    for i, block in enumerate(visual.transformer.resblocks):
        layer = f"encoder.layers.{i}"
        names[f"{layer}.self_attn.out_proj"] = block.attn.out_proj
        names |= {f"{layer}.layer_norm1": block.ln_1, f"{layer}.layer_norm2": block.ln_2}
        names |= {f"{layer}.mlp.fc1": block.mlp.c_fc, f"{layer}.mlp.fc2": block.mlp.c_proj}
        for j, kind in enumerate("qkv"):
            into = tower.get_submodule(f"{layer}.self_attn.{kind}_proj")
            into.weight.copy_(block.attn.in_proj_weight.chunk(3)[j])
            into.bias.copy_(block.attn.in_proj_bias.chunk(3)[j])
    for name, module in names.items():
        tower.get_submodule(name).load_state_dict(module.state_dict())
    first, second = TempMe(theirs, **SMALL)(videos().double()), TempMe(ours, **SMALL)(videos().double())
    assert torch.equal(first.source, second.source)
    torch.testing.assert_close(first.frames, second.frames)


@torch.no_grad()
def test_openai_tower_in_mixed_precision():
    """As OpenAI's weights are stored: products in float16, norms and embeddings in float32."""
    model = OpenAICLIP().eval()
    plain = TempMe(model, **NOTHING)(videos()).frames
    for module in model.visual.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            module.half()
    model.visual.proj.data = model.visual.proj.half()
    assert model.visual.ln_pre.weight.dtype == model.visual.class_embedding.dtype == torch.float32
    out = TempMe(model, **NOTHING)(videos()).frames
    assert out.dtype == torch.float16
    assert F.cosine_similarity(out.float(), plain, dim=-1).min() > 0.999
    merged = TempMe(model, **SMALL)(videos())
    assert merged.tokens.dtype == torch.float16
    assert merged.frames.isfinite().all()


def test_openai_tower_of_three_dimensional_patches_is_refused():
    model = OpenAICLIP()
    model.visual.conv2 = nn.Conv3d(3, 32, (3, 4, 4))
    with pytest.raises(TypeError, match="linear_patch='2d'"):
        TempMe(model)


@pytest.mark.parametrize("make", [vision, lambda: OpenAICLIP().visual], ids=["hugging face", "openai"])
def test_gradients_reach_every_weight(make):
    merging = TempMe(make(), **SMALL)
    out = merging(videos())
    out.frames.square().sum().backward()
    without = [name for name, weight in merging.named_parameters() if weight.grad is None or not weight.grad.any()]
    # a key's bias shifts all scores of a query alike
    assert [name for name in without if not name.endswith("k_proj.bias")] == []
    assert {name for name, _ in merging.positions.named_parameters()} == {"2", "3"}


def test_low_rank_adapters_train_alone():
    model = vision()
    model.requires_grad_(False)
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)
    merging = TempMe(model, **SMALL)
    trained = {name: weight for name, weight in merging.named_parameters() if weight.requires_grad}
    assert len(trained) == 5 * 2 * 2 + 2
    wanted = random_tensor(2, 6, 24, seed=3)
    frozen = copy.deepcopy({name: w for name, w in merging.named_parameters() if not w.requires_grad})
    optimiser = torch.optim.Adam(trained.values(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = 1 - F.cosine_similarity(merging(videos()).frames, wanted, dim=-1).mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(w.grad is not None for w in trained.values())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(weight.any() for name, weight in trained.items() if name.endswith("up"))
    after = dict(merging.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in frozen.items())


def test_peft_adapters_train():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(vision(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    merging = TempMe(model.base_model.model, **SMALL)
    merging(videos()).frames.square().sum().backward()
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(w.grad is not None for w in trained.values())


def test_gradient_checkpointing_gives_the_same_gradients():
    model = vision()
    merging = TempMe(model, **SMALL)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])

    def gradients() -> list[Tensor]:
        merging.zero_grad()
        merging(videos(), mask).frames.square().sum().backward()
        return [weight.grad.clone() for weight in merging.parameters() if weight.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    model.train()
    kept = gradients()
    assert len(plain) == len(kept) > 50
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("backend", "masked"), [pytest.param("inductor", False, marks=pytest.mark.slow), ("aot_eager", True)]
)
def test_compiled_equals_eager(backend, masked):
    merging = TempMe(vision(), **SMALL)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3]) if masked else None
    wide = copy.deepcopy(merging).double()(videos().double(), mask)
    torch._dynamo.reset()
    compiled = torch.compile(merging, fullgraph=True, backend=backend)
    with torch.no_grad():
        out, plain = compiled(videos(), mask), merging(videos(), mask)
    assert torch.equal(out.source, plain.source)
    assert_within_budget(tuple(out[:3]), tuple(plain[:3]), (*wide[:2], wide.size.float()))


def test_leaves_no_trace_in_the_tower():
    model = vision()

    def state(module: nn.Module) -> dict[str, Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return {name: (set(m.__dict__), [dict(getattr(m, h)) for h in hooks]) for name, m in module.named_modules()}

    before, weights = state(model), {name: w.clone() for name, w in model.state_dict().items()}
    plain = model(videos().flatten(0, 1)).image_embeds
    merging = TempMe(model, **SMALL)
    merging(videos())
    assert state(model) == before
    gone = weakref.ref(merging)
    del merging
    gc.collect()
    assert gone() is None
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(videos().flatten(0, 1)).image_embeds, plain)


@pytest.mark.parametrize("make", [vision, lambda: OpenAICLIP().visual], ids=["hugging face", "openai"])
def test_copies_and_state_dicts_stand_on_their_own(make):
    merging = TempMe(make(), **SMALL)
    for position in merging.positions.values():
        nn.init.normal_(position)
    wanted = merging(videos()).frames
    other = copy.deepcopy(merging)
    with torch.no_grad():
        for weight in merging.parameters():
            weight.zero_()
    assert torch.equal(other(videos()).frames, wanted)
    merging.load_state_dict(other.state_dict())
    assert torch.equal(merging(videos()).frames, wanted)


@pytest.mark.gpu
@torch.no_grad()
def test_never_waits_for_the_device():
    merging = TempMe(vision().double(), **SMALL)
    pixels, mask = videos().double(), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    want = merging(pixels, mask)
    merging.cuda()
    pixels, mask = pixels.cuda(), mask.cuda()
    merging(pixels, mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = merging(pixels, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.source.cpu(), want.source)
    torch.testing.assert_close(got.frames.cpu(), want.frames)
