"""CLIP with `encode_video`: plain, with fewer frames, merged inside its tower, or through a memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import transformers

import vmemory
from tests.clip_models import SMALL, videos
from tests.replicas import replicas
from vmemory.banks import DualMemory
from vmemory.compress import AdaptiveFrameResampler, FrameResampler, FrameSelector, TempMe
from vmemory.eval import retrieval_scores

PADDED = torch.tensor([[True] * 6, [True, True, False, True, False, False]])


def clip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "initializer_factor": 4.0}
    config = transformers.CLIPConfig(
        vision_config={**sizes, "num_hidden_layers": 5, "image_size": 16, "patch_size": 4},
        text_config={
            **sizes, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 48,
            "eos_token_id": 49,
        }, projection_dim=24,
    )  # fmt: skip
    return transformers.CLIPModel(config).eval()


def compressors() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "selector": FrameSelector(0.5, 16),
        "resampler": FrameResampler(6, 3, 16, num_layers=1, num_heads=2),
        "adaptive": AdaptiveFrameResampler(6, 2, 4, 16, num_layers=1, num_heads=2),
    }


def by_hand(model: Any, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the directions of each video's frames, one frame after the other."""
    made = []
    for video, there in zip(pixels, mask, strict=True):
        directions = [F.normalize(model.get_image_features(x[None]).pooler_output[0], dim=0) for x in video[there]]
        made.append(F.normalize(torch.stack(directions).mean(0), dim=0))
    return torch.stack(made)


@pytest.mark.parametrize("name", ["merge", "selector", "recent"])
@torch.no_grad()
def test_a_replica_embeds_videos_with_its_own_weights(name):
    model, pixels = clip(), videos()
    memory = TempMe(model, **SMALL) if name == "merge" else compressors().get(name, name)
    vmemory.attach(model, memory)
    if name == "merge":
        for position in model.vmemory.values():
            position.normal_()
    wanted = model.encode_video(pixels, PADDED)
    other = replicas(model)[1]
    for weight in model.parameters():
        weight.fill_(0.5)
    assert torch.equal(other.encode_video(pixels, PADDED), wanted)
    assert not torch.equal(model.encode_video(pixels, PADDED), wanted)


def test_a_video_is_the_mean_of_the_directions_of_its_frames():
    model, pixels = clip(), videos()
    alone = model.get_image_features(pixels[0]).pooler_output
    with vmemory.attach(model), torch.no_grad():
        torch.testing.assert_close(model.encode_video(pixels), by_hand(model, pixels, torch.ones_like(PADDED)))
        broken = pixels.masked_fill(~PADDED[:, :, None, None, None], torch.nan)
        torch.testing.assert_close(model.encode_video(broken, PADDED), by_hand(model, pixels, PADDED))
        nothing = model.encode_video(pixels, torch.zeros_like(PADDED))
        assert torch.equal(nothing, torch.zeros(2, 24))
        assert torch.equal(model.get_image_features(pixels[0]).pooler_output, alone)


@pytest.mark.parametrize("name", ["selector", "resampler", "adaptive"])
def test_a_compressor_stands_before_the_tower(name):
    model, pixels, compressor = clip(), videos(), compressors()[name]
    with vmemory.attach(model, compressor) as handle:
        assert model.vmemory is compressor
        assert not compressor.training
        with torch.no_grad():
            made = compressor(pixels, PADDED)
            torch.testing.assert_close(model.encode_video(pixels, PADDED), by_hand(model, made.frames, made.mask))
            with handle.disabled():
                torch.testing.assert_close(model.encode_video(pixels, PADDED), by_hand(model, pixels, PADDED))
        model.train()
        model.encode_video(pixels, PADDED)[:, 0].sum().backward()
        assert sum(float(w.grad.abs().sum()) for w in compressor.parameters() if w.grad is not None) > 0
        assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_a_selector_that_keeps_all_changes_nothing():
    model, pixels = clip(), videos()
    with vmemory.attach(model):
        plain = model.encode_video(pixels, PADDED)
    with vmemory.attach(model, FrameSelector(1.0, 16)):
        torch.testing.assert_close(model.encode_video(pixels, PADDED), plain)


def test_merging_happens_inside_the_tower():
    model, pixels = clip(), videos()
    merging = TempMe(model, **SMALL)
    before = [*model.state_dict()]
    with vmemory.attach(model, merging):
        assert set(model.state_dict()) == {*before, "vmemory.2", "vmemory.3"}
        expected = F.normalize(merging(pixels).frames, dim=-1).mean(1)
        torch.testing.assert_close(model.encode_video(pixels), F.normalize(expected, dim=-1))
        model.encode_video(pixels, PADDED)[:, 0].sum().backward()
        assert all(w.grad.abs().sum() > 0 for w in model.vmemory.values())
        other = copy.deepcopy(model)
        assert torch.equal(other.encode_video(pixels), model.encode_video(pixels))
        assert vmemory.attached(other)._prompts.given.tower is other.vision_model
    assert [*model.state_dict()] == before
    with vmemory.attach(model):
        plain = model.encode_video(pixels)
    with vmemory.attach(model, TempMe(model, 6, merge_layers=[], merge_frames=[], r=0)):
        torch.testing.assert_close(model.encode_video(pixels), plain)
    with pytest.raises(ValueError, match="TempMe of the model's own tower"):
        vmemory.attach(clip(), merging)


@pytest.mark.parametrize("policy", ["hierarchical", "recent", "merging", "uniform", "episodic", "reservoir", "dual"])
def test_a_memory_stands_behind_the_tower(policy):
    model, pixels = clip(), videos()
    with vmemory.attach(model), torch.no_grad():
        plain = model.encode_video(pixels, PADDED)
    with vmemory.attach(model, policy) as handle, torch.no_grad():
        torch.testing.assert_close(model.encode_video(pixels, PADDED), plain)
        assert [k.grid for k in handle.last_prompt] == [(6, 1, 1), (3, 1, 1)]
        assert torch.equal(model.encode_video(pixels, torch.zeros_like(PADDED)), torch.zeros(2, 24))


def test_a_small_memory_keeps_what_its_policy_says():
    model, pixels = clip(), videos()
    settings = {"memory_policy": "recent", "memory_capacities": 2}
    with vmemory.attach(model, config=settings) as handle:
        got = model.encode_video(pixels, PADDED)
        last = torch.zeros_like(PADDED)
        last[0, 4:] = last[1, [1, 3]] = True
        torch.testing.assert_close(got, by_hand(model, pixels, last))
        assert [k.source.tolist() for k in handle.last_prompt] == [[4, 5], [1, 2]]
        got[:, 0].sum().backward()
        assert model.visual_projection.weight.grad.abs().sum() > 0
    with vmemory.attach(model, config={**settings, "memory_chunk_frames": 2}), torch.no_grad():
        torch.testing.assert_close(model.encode_video(pixels, PADDED), got)


def test_a_dual_memory_learns():
    model, pixels = clip(), videos()
    with vmemory.attach(model, DualMemory(24, (1, 1), (2, 3), heads=4, residual=True)):
        model.encode_video(pixels)[:, 0].sum().backward()
        assert model.vmemory.alpha.grad.abs() > 0


def test_lora_saves_and_trains_a_selector_with_it():
    peft = pytest.importorskip("peft")
    model, pixels = clip(), videos()
    vmemory.attach(model, FrameSelector(0.5, 16))
    settings = peft.LoraConfig(r=2, target_modules=r".*vision_model.*q_proj", modules_to_save=["vmemory"])
    outer = peft.get_peft_model(model, settings).train()
    outer.encode_video(pixels, PADDED)[:, 0].sum().backward()
    grads = {name: w.grad for name, w in outer.named_parameters() if "modules_to_save" in name and w.requires_grad}
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0


def test_detached_it_leaves_no_trace():
    model, pixels = clip(), videos()
    before = dict(model.__dict__), dict(model.config.__dict__), [*model.state_dict()], [*model.named_modules()]
    for memory in (None, "merging", FrameSelector(0.5, 16), TempMe(model, **SMALL)):
        with vmemory.attach(model, memory):
            model.encode_video(pixels)
        assert not hasattr(model, "encode_video")
        assert (dict(model.__dict__), dict(model.config.__dict__), [*model.state_dict()]) == before[:3]
        assert [*model.named_modules()] == before[3]


def test_texts_find_their_videos_after_training_through_a_selector():
    model = clip().train()
    torch.manual_seed(3)
    # of each video two of six frames tell it from the others
    pixels = 0.3 * torch.randn(4, 1, 3, 16, 16) + torch.zeros(4, 6, 3, 16, 16)
    pixels[:, [1, 4]] += 2 * torch.randn(4, 1, 3, 16, 16)
    texts = torch.tensor([[48, 3 + 5 * i, 7 * i + 1, 49] for i in range(4)])
    with vmemory.attach(model, FrameSelector(0.5, 16)) as handle:
        learner = torch.optim.Adam(model.parameters(), 3e-4)

        def similarity() -> torch.Tensor:
            return F.normalize(model.get_text_features(texts).pooler_output, dim=-1) @ model.encode_video(pixels).T

        for _ in range(40):
            scaled = similarity() / 0.07
            loss = F.cross_entropy(scaled, torch.arange(4)) + F.cross_entropy(scaled.T, torch.arange(4))
            learner.zero_grad()
            loss.backward()
            learner.step()
        model.eval()
        with torch.no_grad():
            result = retrieval_scores(similarity(), ks=(1, 2))
        assert result.text_to_video.recall[1] == result.video_to_text.recall[1] == 1.0
        wrong = retrieval_scores(similarity().detach().roll(1, 1), ks=(1,))
        assert wrong.text_to_video.recall[1] == 0.0
        # and a memory whose entries are half of the frames still finds the videos that all frames describe
        handle.detach()
        with vmemory.attach(model), torch.no_grad():
            queries = model.encode_video(pixels)
        with vmemory.attach(model, config={"memory_policy": "merging", "memory_capacities": 3}), torch.no_grad():
            assert retrieval_scores(queries @ model.encode_video(pixels).T).text_to_video.recall[1] == 1.0


def test_what_does_not_fit_is_named():
    model = clip()
    with pytest.raises(TypeError, match=r"memory: expected a name, a memory with compress, .* got Linear"):
        vmemory.attach(model, torch.nn.Linear(2, 2))
    with vmemory.attach(model):
        with pytest.raises(ValueError, match=r"pixel_values: expected .*\[B, T, 3, H, W\]"):
            model.encode_video(torch.zeros(2, 3, 16, 16))
        with pytest.raises(ValueError, match="at least 1 frame"):
            model.encode_video(torch.zeros(2, 0, 3, 16, 16))
        with pytest.raises(ValueError, match=r"mask: expected bool \[2, 6\], got torch.int64 of shape"):
            model.encode_video(videos(), PADDED.long())
        with pytest.raises(ValueError, match="got CLIP; see its encode_video"):
            vmemory.compress_inputs(model, {"pixel_values": videos(), "input_ids": torch.zeros(1, 2).long()})
        with pytest.raises(ValueError, match="expected one without a memory"):
            vmemory.attach(model)
