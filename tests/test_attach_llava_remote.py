"""LLaVA-NeXT's Qwen class with a memory, on a stand-in with its methods and data flow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from torch import nn
from transformers import DynamicCache

import vmemory
from tests.remote_models import llava_qwen
from tests.tiny_vlms import tiny
from vmemory.banks import DualMemory, RecentBank
from vmemory.models.geometry import GeometryFusion

SMALL = {"memory_capacities": (2, 2, 1)}
FITS = {"memory_policy": "recent", "memory_capacities": (100,)}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
NEWLINES = ["grid", "frame", "one_token", "no_token"]


def prepared(model: Any, inputs: dict[str, Any]) -> Any:
    given = [inputs[name] if name else None for name in ("input_ids", "", "attention_mask", "", "", "images")]
    return model.prepare_inputs_labels_for_multimodal(*given, inputs["modalities"])


def answered(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    rest = dict(inputs)
    return model.generate(rest.pop("input_ids"), **rest, **GREEDY)


class Depth(nn.Module):
    """Stands for a geometry encoder: 5 tokens of 6 channels a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 30)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.linear(frames.mean((2, 3))).unflatten(-1, (5, 6))


def geometry(memory: Any = None) -> GeometryFusion:
    torch.manual_seed(5)
    return GeometryFusion(32, 6, Depth(), heads=4, memory=memory)


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("memory", ["fits", "dual", "geometry"])
def test_what_changes_nothing_changes_nothing_to_the_bit(newline, memory):
    model, inputs = llava_qwen(T=8, B=2, newline=newline)
    labels = inputs["input_ids"].clone()
    plain, answer = model(**inputs, labels=labels), answered(model, inputs)
    given = {"fits": (None, FITS), "dual": ("dual", None), "geometry": (geometry(), FITS)}[memory]
    with vmemory.attach(model, *given) as handle:
        same = model(**inputs, labels=labels)
        assert torch.equal(same.logits, plain.logits)
        assert torch.equal(same.loss, plain.loss)
        assert torch.equal(answered(model, inputs), answer)
        assert [k.grid[0] for k in handle.last_prompt] == [8, 11]
    with vmemory.attach(model, config=SMALL) as handle, handle.disabled():
        assert torch.equal(model(**inputs).logits, plain.logits)


def rows_of(source: torch.Tensor, newline: str) -> int:
    """Newlines that tokens of a 4 × 4 grid bring with them."""
    return {"grid": len(set((source // 4).tolist())), "frame": len(set((source // 16).tolist())), "one_token": 1}.get(
        newline, 0
    )


@pytest.mark.parametrize("newline", NEWLINES)
def test_every_newline_mode_marks_what_is_left(newline):
    model, inputs = llava_qwen(T=8, B=2, newline=newline)
    with vmemory.attach(model, config=SMALL) as handle:
        _, _, mask, _, embeds, _ = prepared(model, inputs)
    assert [k.grid for k in handle.last_prompt] == [(8, 4, 4), (11, 4, 4)]
    for row, k in enumerate(handle.last_prompt):
        assert 0 < len(k.source) < k.grid[0] * 16
        body = embeds[row][mask[row].bool()][4:-5]
        assert len(body) == len(k.source) + rows_of(k.source, newline)
        is_newline = (body == model.model.image_newline).all(-1)
        assert int((~is_newline).sum()) == k.tokens_after
        if newline in ("grid", "frame"):
            group = k.source // (4 if newline == "grid" else 16)
            ends = (group != torch.cat([group[1:], group[:1] - 1])).nonzero().flatten()
            expected = ends + torch.arange(1, len(ends) + 1)
            assert torch.equal(is_newline.nonzero().flatten(), expected)


@pytest.mark.parametrize("newline", NEWLINES)
def test_a_selecting_memory_equals_the_model_on_the_shorter_video(newline):
    model, inputs = llava_qwen(T=8, B=2, newline=newline)
    short = inputs | {"images": [video[-3:] for video in inputs["images"]]}
    plain = model(**short).logits
    with vmemory.attach(model, config={"memory_policy": "recent", "memory_capacities": (3,)}):
        torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-5, rtol=1e-5)
        assert torch.equal(answered(model, inputs), answered(model, short))


def test_videos_of_a_batch_do_not_share_a_memory():
    model, inputs = llava_qwen(T=8, B=2, newline="frame")
    swapped = inputs | {
        "images": inputs["images"][::-1], "input_ids": inputs["input_ids"].flip(0),
    }  # fmt: skip
    memory = DualMemory(32, (8, 8), (2, 3), heads=4, residual=True)
    for given in ({"config": SMALL}, {"memory": memory}):
        with vmemory.attach(model, **given):
            if hasattr(model, "vmemory"):
                nn.init.ones_(model.vmemory.alpha)
            forth, back = (prepared(model, x) for x in (inputs, swapped))
            for row in range(2):
                one, other = (p[4][b][p[2][b].bool()] for p, b in ((forth, row), (back, 1 - row)))
                torch.testing.assert_close(one, other)


def test_the_dual_memory_sees_frames_before_they_are_pooled():
    model, inputs = llava_qwen(T=8)
    plain = model(**inputs).logits
    with vmemory.attach(model, DualMemory(32, (8, 8), (2, 3), heads=4, residual=True)) as handle:
        model(**inputs)
        assert handle.last_prompt[0].grid == (8, 8, 8)
        nn.init.ones_(model.vmemory.alpha)
        trained = model(**inputs).logits
        assert trained.shape == plain.shape
        assert not torch.equal(trained, plain)


@pytest.mark.parametrize("newline", NEWLINES)
def test_gradients_reach_tower_projector_newline_and_memory(newline):
    model, inputs = llava_qwen(T=6, B=2, newline=newline)
    model.train()
    labels = inputs["input_ids"]
    with vmemory.attach(model, config=SMALL):
        model(**inputs, labels=labels).loss.backward()
    for weight in (model.model.vision_tower.patch.weight, model.model.mm_projector.weight):
        assert weight.grad.abs().sum() > 0
    assert newline == "no_token" or model.model.image_newline.grad.abs().sum() > 0
    with vmemory.attach(model, DualMemory(32, (8, 8), (2, 3), heads=4, residual=True)):
        model(**inputs, labels=labels).loss.backward()
        assert model.vmemory.alpha.grad.abs() > 0


def test_geometry_is_nothing_at_first_and_learns():
    fusion = geometry()
    tokens, frames = torch.randn(3, 16, 32, requires_grad=True), torch.randn(3, 3, 8, 8)
    out = fusion(tokens, frames)
    assert torch.equal(out, tokens)
    out.square().sum().backward()
    assert fusion.gate.grad.abs() > 0
    assert torch.allclose(tokens.grad, 2 * tokens)
    fusion.zero_grad()
    with torch.no_grad():
        fusion.gate.fill_(0.5)
    out = fusion(tokens, frames)
    assert out.shape == tokens.shape
    assert not torch.equal(out, tokens)
    out.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in fusion.parameters())
    # frames look at their own geometry alone
    other = fusion(tokens, torch.cat([frames[:2], frames[2:] + 1]))
    assert torch.equal(other[:2], out[:2])
    assert not torch.equal(other[2], out[2])


@pytest.mark.parametrize("inner", [None, "dual", "recent"])
def test_geometry_stands_before_the_memory(inner):
    model, inputs = llava_qwen(T=8, newline="grid")
    memory = {
        "dual": lambda: DualMemory(32, (8, 8), (2, 3), heads=4, residual=True),
        "recent": lambda: RecentBank(32, (4, 4), 3),
    }
    fusion = geometry(None if inner is None else memory[inner]())
    before = [*model.state_dict()]
    with vmemory.attach(model, fusion, SMALL) as handle:
        plain = model(**inputs).logits
        with torch.no_grad():
            fusion.gate.fill_(1.0)
        out = model(**inputs, labels=inputs["input_ids"])
        assert out.logits.shape == plain.shape
        assert not torch.equal(out.logits, plain)
        out.loss.backward()
        assert model.vmemory.encoder.linear.weight.grad.abs().sum() > 0
        assert handle.last_prompt[0].tokens_after == {"dual": 8 * 64, "recent": 3 * 16}.get(inner, 2 * 16 + 2 * 4 + 1)
    assert [*model.state_dict()] == before


def test_lora_saves_and_trains_geometry_with_it():
    peft = pytest.importorskip("peft")
    model, inputs = llava_qwen(T=6)
    vmemory.attach(model, geometry(), SMALL)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["vmemory"])
    outer = peft.get_peft_model(model, settings).train()
    outer(**inputs, labels=inputs["input_ids"]).loss.backward()
    gate = next(w for name, w in outer.named_parameters() if name.endswith("modules_to_save.default.gate"))
    assert gate.grad.abs() > 0


def test_geometry_under_autocast():
    model, inputs = llava_qwen(T=6)
    fusion = geometry(DualMemory(32, (8, 8), (2, 3), heads=4, residual=True))
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs).logits
        with vmemory.attach(model, fusion):
            out = model(**inputs, labels=inputs["input_ids"])
            assert torch.equal(out.logits, plain)
            out.loss.backward()
            assert fusion.gate.grad.abs() > 0
            assert fusion.memory.alpha.grad.abs() > 0


def test_geometry_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"heads: expected a divisor of width \(32\), got 5"):
        GeometryFusion(32, 6, Depth(), heads=5)
    with pytest.raises(TypeError, match="encoder: expected a callable"):
        GeometryFusion(32, 6, 3)
    with pytest.raises(ValueError, match=r"tokens: expected \[T, n, 32\], got shape \[2, 4, 8\]"):
        geometry()(torch.zeros(2, 4, 8), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"geometry: expected \[2, P, 7\] from the encoder, got shape \[2, 5, 6\]"):
        GeometryFusion(32, 7, Depth())(torch.zeros(2, 4, 32), torch.zeros(2, 3, 8, 8))
    model, _ = tiny("qwen2_5_vl")
    with pytest.raises(ValueError, match="memory: expected one without geometry"):
        vmemory.attach(model, geometry())
    model, _ = llava_qwen()
    with pytest.raises(ValueError, match="memory: expected a DualMemory inside GeometryFusion"):
        vmemory.attach(model, geometry(), {"memory_policy": "dual"})
    assert vmemory.attached(model) is None


def test_chunks_of_frames_bound_the_tower():
    model, inputs = llava_qwen(T=8, B=2)
    with vmemory.attach(model, config=SMALL):
        whole = model(**inputs).logits
    model.model.vision_tower.calls.clear()
    with vmemory.attach(model, config={**SMALL, "memory_chunk_frames": 3}):
        torch.testing.assert_close(model(**inputs).logits, whole, atol=1e-5, rtol=1e-5)
    assert max(model.model.vision_tower.calls) == 3


def test_pictures_beside_a_video_stay_whole():
    model, inputs = llava_qwen(T=8, newline="frame")
    ids = torch.cat([torch.tensor([[20, -200]]), inputs["input_ids"]], 1)
    inputs |= {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "modalities": ["image", "video"],
        "images": [inputs["images"][0][:1], *inputs["images"]],
    }  # fmt: skip
    picture = model.encode_images(inputs["images"][0])[0]
    with vmemory.attach(model, config=SMALL) as handle:
        embeds = prepared(model, inputs)[4]
        torch.testing.assert_close(embeds[0, 1 : 1 + 64], picture)
        assert len(handle.last_prompt) == 1


def test_detached_it_leaves_no_trace_and_a_copy_has_its_own():
    model, inputs = llava_qwen(T=8, newline="grid")
    before = dict(model.__dict__), dict(model.config.__dict__), [*model.state_dict()], [*model.named_modules()]
    plain = model(**inputs).logits
    handle = vmemory.attach(model, config=SMALL)
    small = model(**inputs).logits
    other = copy.deepcopy(model)
    vmemory.attached(other).detach()
    assert torch.equal(other(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, small)
    handle.detach()
    assert (dict(model.__dict__), dict(model.config.__dict__), [*model.state_dict()]) == before[:3]
    assert [*model.named_modules()] == before[3]
    assert torch.equal(model(**inputs).logits, plain)


def test_what_it_cannot_do_it_says():
    model, inputs = llava_qwen(T=8)
    with vmemory.attach(model, config=SMALL):
        cache = DynamicCache()
        model(input_ids=inputs["input_ids"][:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: expected an empty cache"):
            model(**inputs, past_key_values=cache)
    model.config.add_faster_video = True
    with pytest.raises(ValueError, match="expected add_faster_video off"):
        vmemory.attach(model, config=SMALL)
