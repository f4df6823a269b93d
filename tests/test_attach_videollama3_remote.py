"""VideoLLaMA3's remote code with a memory, on a stand-in with its methods and data flow."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from torch import nn
from transformers import DynamicCache

import vmemory
from tests.remote_models import PLACE, RemoteVideoLlama3, video_llama
from vmemory.banks import DualMemory, RecentBank

SMALL = {"memory_capacities": (2, 2, 1), "memory_chunk_frames": None}
FITS = {"memory_policy": "recent", "memory_capacities": (100,)}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ARGUMENTS = ("pixel_values", "grid_sizes", "merge_sizes", "modals")


def length(model: Any, inputs: dict[str, Any]) -> int:
    return model(**inputs).logits.shape[1]


def test_a_model_is_known_by_its_methods_whatever_its_type_says():
    model, inputs = video_llama()
    model.config.model_type = "something_else"
    with vmemory.attach(model, config=SMALL):
        assert length(model, inputs) < inputs["input_ids"].shape[1]


def test_a_model_of_that_type_without_the_methods_is_refused_by_name():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="videollama3_qwen2")
    with pytest.raises(ValueError, match=r"methods get_model.*_compress_visual_tokens.*got Linear"):
        vmemory.attach(model)


def test_the_model_s_own_config_switches_it():
    model, inputs = video_llama(T=8)
    plain = model(**inputs).logits
    model.config.enable_memory_bank = False
    model.config.memory_capacities, model.config.memory_reduced_sizes = [2, 2, 1], [16, 4, 1]
    with vmemory.attach(model) as handle:
        assert not model.has_memory_bank()
        assert torch.equal(model(**inputs).logits, plain)
        assert handle.config.memory_capacities == (2, 2, 1)
    model.config.enable_memory_bank, model.config.max_frames_before_compression = True, 8
    with vmemory.attach(model):
        assert model.has_memory_bank()
        assert torch.equal(model(**inputs).logits, plain)
    model.config.max_frames_before_compression = 7
    with vmemory.attach(model) as handle:
        assert length(model, inputs) < plain.shape[1]
        assert handle.last_prompt[0].tokens_after == 2 * 16 + 2 * 4 + 1


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("prompts", "picture"), [(1, False), (2, True)])
def test_what_fits_changes_nothing_to_the_bit(own, prompts, picture):
    model, inputs = video_llama(prompts=prompts, picture=picture, own=own)
    inputs["labels"] = inputs["input_ids"].clone()
    plain = model(**inputs)
    answer = model.generate(**{k: v for k, v in inputs.items() if k != "labels"}, **GREEDY)
    with vmemory.attach(model, config=FITS) as handle:
        same = model(**inputs)
        assert torch.equal(same.logits, plain.logits)
        assert torch.equal(same.loss, plain.loss)
        assert torch.equal(model.generate(**{k: v for k, v in inputs.items() if k != "labels"}, **GREEDY), answer)
        assert len(handle.last_prompt) == prompts
        assert model.config.use_token_compression is own
    with vmemory.attach(model, config=SMALL) as handle, handle.disabled():
        assert torch.equal(model(**inputs).logits, plain.logits)
        assert not model.has_memory_bank()


@pytest.mark.parametrize("own", [False, True])
def test_a_selecting_memory_equals_the_model_on_the_shorter_prompt(own):
    model, inputs = video_llama(T=8, own=own)
    model.config.use_token_compression = False
    ids = inputs["input_ids"][0]
    keep = torch.ones_like(ids, dtype=torch.bool)
    places = (ids == PLACE).nonzero().flatten().view(8, -1)
    first_word, last_gone = 4, int(places[4, -1])
    keep[first_word : last_gone + 2] = False  # five frames, their times, and the mark before the sixth
    rest = {k: v for k, v in inputs.items() if k not in ("position_ids", "attention_mask", "input_ids")}
    rest["pixel_values"] = inputs["pixel_values"].view(8, -1, inputs["pixel_values"].shape[-1])[5:].flatten(0, 1)
    rest["grid_sizes"] = torch.tensor([[3, *inputs["grid_sizes"][0, 1:].tolist()]])
    expected = model(input_ids=ids[keep][None], **rest).logits
    model.config.use_token_compression = own
    changed = model._get_compression_mask(
        inputs["pixel_values"], torch.tensor([8 * 16]), *(inputs[k] for k in ARGUMENTS[1:])
    ).view(8, 16)
    with vmemory.attach(model, config={"memory_policy": "recent", "memory_capacities": (3,)}):
        got = model(**inputs).logits
        if not own:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert not bool(changed[5:].all())
        assert got.shape[1] == expected.shape[1] - (int((~changed[5:]).sum()) if own else 0)


def test_packed_prompts_shrink_each_by_itself_with_their_positions_and_labels():
    model, inputs = video_llama(T=8, prompts=2, picture=True)
    inputs["labels"] = inputs["input_ids"].clone()
    with vmemory.attach(model, config=SMALL) as handle:
        _, mask, positions, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            **{k: v for k, v in inputs.items() if k != "labels"}, labels=inputs["labels"]
        )
        starts = (positions[0] == 0).nonzero().flatten().tolist()
        assert len(starts) == 2
        assert positions[0].tolist() == [*range(starts[1]), *range(positions.shape[1] - starts[1])]
        assert mask.shape == positions.shape == labels.shape == embeds.shape[:2]
        kept = sum(len(k.source) for k in handle.last_prompt)
        assert int((labels == PLACE).sum()) == kept + 2 * 4


def test_samples_without_a_picture_bring_pixels_that_are_nothing():
    model, inputs = video_llama(T=8)
    ids = torch.cat([inputs["input_ids"], torch.full((1, 6), 33)], 1)
    inputs |= {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "position_ids": torch.cat([inputs["position_ids"], torch.arange(6)[None]], 1),
        "pixel_values": torch.cat([inputs["pixel_values"], torch.full((4, 12), 1e3)]),
        "grid_sizes": torch.cat([inputs["grid_sizes"], torch.tensor([[1, 2, 2]])]),
        "merge_sizes": torch.tensor([2, 2]), "modals": ["video", "text"],
    }  # fmt: skip
    plain = model(**inputs).logits
    with vmemory.attach(model, config=FITS):
        assert torch.equal(model(**inputs).logits, plain)
    with vmemory.attach(model, config=SMALL) as handle:
        short = length(model, inputs)
        gone = 8 * 16 - len(handle.last_prompt[0].source)
        assert 0 < gone <= plain.shape[1] - short
        assert model.encode_images_with_memory(*(inputs[k] for k in ARGUMENTS)).shape[0] == 8 * 16 - gone


def test_prompts_cut_in_training_lose_the_tokens_that_have_no_place():
    model, inputs = video_llama(T=8)
    cut = 4 + 5 * (3 + 16 + 1) + 10
    short = inputs | {k: inputs[k][:, :cut] for k in ("input_ids", "attention_mask", "position_ids")}
    plain = model(**short).logits
    with vmemory.attach(model, config=FITS) as handle:
        assert torch.equal(model(**short).logits, plain)
        assert handle.last_prompt[0].tokens_before == int((short["input_ids"] == PLACE).sum())
    with vmemory.attach(model, config={"memory_policy": "recent", "memory_capacities": (2,)}):
        # of the last two frames that the tower saw nothing has a place
        assert length(model, short) == int((short["input_ids"] != PLACE).sum())


def test_gradients_reach_tower_and_projector_and_memory():
    model, inputs = video_llama(T=8)
    model.train()
    with vmemory.attach(model, config=SMALL):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in (model.model.vision_encoder.patch, model.model.mm_projector):
        assert layer.weight.grad.abs().sum() > 0
    plain = model(**inputs).logits
    with vmemory.attach(model, DualMemory(32, (4, 4), (2, 3), heads=2, residual=True)):
        out = model(**inputs, labels=inputs["input_ids"])
        assert torch.equal(out.logits, plain)
        out.loss.backward()
        assert model.vmemory.alpha.grad.abs() > 0


def test_chunks_of_frames_give_the_same_tokens_and_smaller_calls():
    model, inputs = video_llama(T=9, prompts=2, picture=True)
    with vmemory.attach(model, config=SMALL):
        whole = model(**inputs).logits
    model.model.vision_encoder.calls.clear()
    with vmemory.attach(model, config={**SMALL, "memory_chunk_frames": 2}):
        torch.testing.assert_close(model(**inputs).logits, whole, atol=1e-5, rtol=1e-5)
    assert max(model.model.vision_encoder.calls) == 2 * 64


def test_eager_attention_sees_all_frames_and_refuses_pieces():
    model, inputs = video_llama(T=9, attention="eager")
    whole = model(**inputs).logits
    alone = model.encode_images(inputs["pixel_values"][:64], torch.tensor([[1, 8, 8]]), inputs["merge_sizes"])
    with vmemory.attach(model, config=FITS | {"memory_chunk_frames": 9}):
        assert torch.equal(model(**inputs).logits, whole)
        everything = model.encode_images(*(inputs[name] for name in ARGUMENTS[:3]))
        assert (everything[:16] - alone).abs().max() > 1e-3
    with vmemory.attach(model, config=FITS | {"memory_chunk_frames": 8}) as handle:
        with pytest.raises(ValueError, match=r"memory_chunk_frames: expected None, got 8 .* eager attention"):
            model(**inputs)
        assert model.config.use_token_compression is False
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, whole)


def test_the_accessors_that_the_sources_promise():
    model, inputs = video_llama(T=8, picture=True)
    arguments = [inputs[name] for name in ARGUMENTS]
    everything = model.encode_images(*arguments[:3])
    handle = vmemory.attach(model, config=SMALL)
    assert model.has_memory_bank()
    assert model.get_memory_bank() is None
    with torch.no_grad():
        tokens = model.encode_images_with_memory(*arguments, timestamps=torch.arange(8) * 0.5)
    kept = handle.last_prompt[0]
    assert tokens.shape == (4 + len(kept.source), 32)
    assert torch.equal(tokens[:4], everything[:4])
    bank = model.get_memory_bank()
    assert torch.equal(bank.read().source, kept.source)
    torch.testing.assert_close(bank.read().tokens, tokens[4:])
    found = bank.search(everything[4 + 7 * 16 :].mean(0)[None].detach(), 1)
    assert float(found.time) == 3.5
    with pytest.raises(ValueError, match=r"timestamps: expected \[8\] seconds, got shape \[3\]"):
        model.encode_images_with_memory(*arguments, timestamps=[0.0, 1.0, 2.0])
    handle.detach()
    for name in ("encode_images_with_memory", "get_memory_bank", "has_memory_bank"):
        assert not hasattr(model, name)


def test_a_memory_that_was_given_is_the_bank():
    model, inputs = video_llama(T=8)
    bank = RecentBank(32, (4, 4), 3)
    with vmemory.attach(model, bank), torch.no_grad():
        assert model.get_memory_bank() is bank
        tokens = model.encode_images_with_memory(*(inputs[k] for k in ("pixel_values", "grid_sizes", "merge_sizes")))
        assert torch.equal(bank.read().tokens, tokens)


def test_detached_it_leaves_no_trace():
    model, inputs = video_llama(T=8)
    before = dict(model.__dict__), dict(model.config.__dict__), [*model.state_dict()], [*model.named_modules()]
    plain = model(**inputs).logits
    with vmemory.attach(model, config=SMALL):
        assert length(model, inputs) < plain.shape[1]
    assert (dict(model.__dict__), dict(model.config.__dict__), [*model.state_dict()]) == before[:3]
    assert [*model.named_modules()] == before[3]
    assert torch.equal(model(**inputs).logits, plain)


def test_a_copy_has_a_memory_of_its_own():
    model, inputs = video_llama(T=8)
    plain = model(**inputs).logits
    vmemory.attach(model, config=SMALL)
    small = model(**inputs).logits
    other = copy.deepcopy(model)
    vmemory.attached(other).detach()
    assert torch.equal(other(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, small)
    assert other.config.use_token_compression is False


def test_answers_with_a_memory_are_new_tokens_alone_as_the_model_gives_them():
    model, inputs = video_llama(T=8)
    with vmemory.attach(model, config=SMALL):
        answer = model.generate(**inputs, **GREEDY)
        assert answer.shape == (1, 4)
        logits = model(**inputs).logits
        assert int(logits[0, -1].argmax()) == int(answer[0, 0])


def test_what_it_cannot_do_it_says_before_anything_changes():
    model, inputs = video_llama(T=8)
    with vmemory.attach(model, config=SMALL):
        cache = DynamicCache()
        model(input_ids=inputs["input_ids"][:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: expected an empty cache"):
            model(**inputs, past_key_values=cache)
        two = {k: v.repeat(2, 1) for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
        with pytest.raises(ValueError, match=r"input_ids: expected one row \[1, L\]"):
            model(**(inputs | two))
        assert model.config.use_token_compression is False
        with pytest.raises(ValueError, match="puts its prompt together inside"):
            vmemory.compress_inputs(model, inputs)
        with pytest.raises(ValueError, match="expected one without a memory"):
            vmemory.attach(model)
    taken = type("Taken", (RemoteVideoLlama3,), {"has_memory_bank": lambda self: False})(model.config)
    with pytest.raises(ValueError, match="expected no has_memory_bank of its own, got Taken"):
        vmemory.attach(taken)
