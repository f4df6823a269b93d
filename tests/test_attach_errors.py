"""What attach refuses, in one line each, before anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from torch import nn

import vmemory
from tests.attaching import GREEDY, SMALL
from tests.tiny_vlms import tiny
from vmemory.banks import DualMemory


def test_a_prompt_through_another_memory_than_the_one_attached():
    model, inputs = tiny("qwen2_5_vl", T=12)
    expected = vmemory.compress_inputs(model, inputs, config=SMALL)["input_ids"]
    with vmemory.attach(model, "dual"):
        assert vmemory.compress_inputs(model, inputs)["input_ids"].shape == inputs["input_ids"].shape
        assert torch.equal(vmemory.compress_inputs(model, inputs, config=SMALL)["input_ids"], expected)
        memory = DualMemory(32, (4, 4), (2, 3), heads=2, residual=True)
        whole = vmemory.compress_inputs(model, inputs, memory)["mm_encoder_outputs"]["video"].pooler_output[0]
        whole.sum().backward()
        assert all(w.grad is None for w in model.vmemory.parameters())


def test_an_unknown_model_is_told_what_was_found_and_what_is_known():
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected one of .*clip.*qwen2_5_vl.*video_llama_3.*videollama3_qwen2") as e:
        vmemory.attach(model)
    assert "got Qwen2ForCausalLM of type 'qwen2'" in str(e.value)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        vmemory.attach("qwen2_5_vl")


def test_a_speaking_model_is_sent_to_its_thinker():
    thinker, inputs = tiny("qwen2_5_omni_thinker")
    whole = nn.Module()
    whole.thinker = thinker
    with pytest.raises(ValueError, match=r"expected the part that reads the prompt, model.thinker, got Module"):
        vmemory.attach(whole)
    with vmemory.attach(thinker, config=SMALL):
        with pytest.raises(ValueError, match="output_hidden_states: expected False with a memory, got True"):
            thinker.generate(**inputs, **GREEDY, output_hidden_states=True)
        with pytest.raises(ValueError, match="output_hidden_states: expected False"):
            thinker(**inputs, output_hidden_states=True)


def test_a_new_video_after_something_cached():
    model, inputs = tiny("qwen2_5_vl")
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        model(input_ids=inputs["input_ids"][:, :3], past_key_values=cache)
        with pytest.raises(ValueError, match=r"past_key_values: expected an empty cache .* got one of 3 tokens"):
            model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: expected an empty cache"):
            model.generate(**inputs, **GREEDY, past_key_values=cache)


def test_twice_is_an_error_and_changes_nothing():
    model, inputs = tiny("qwen2_5_vl")
    handle = vmemory.attach(model, config=SMALL)
    short = model(**inputs).logits
    with pytest.raises(ValueError, match="expected one without a memory, got one that has one"):
        vmemory.attach(model, "dual")
    assert torch.equal(model(**inputs).logits, short)
    handle.detach()
    with pytest.raises(ValueError, match="expected a memory that is still in its model"):
        handle.detach()


def test_an_unknown_setting_is_named_with_the_nearest():
    model, _ = tiny("qwen2_5_vl")
    before = dict(model.__dict__), dict(model.config.__dict__)
    with pytest.raises(ValueError, match="'memory_capacity'; did you mean 'memory_capacities'"):
        vmemory.attach(model, config={"memory_capacity": (1, 2, 3)})
    with pytest.raises(TypeError, match="memory: expected a name"):
        vmemory.attach(model, 3)
    with pytest.raises(ValueError, match="memory: expected a DualMemory for 32 channels, got one for 16"):
        vmemory.attach(model, DualMemory(16, (4, 4), (2, 3), heads=2))
    model.vmemory = nn.Identity()
    with pytest.raises(ValueError, match="expected no attribute 'vmemory'"):
        vmemory.attach(model, "dual")
    del model.vmemory
    assert (dict(model.__dict__), dict(model.config.__dict__)) == before


def test_a_transformers_that_is_too_old_is_named():
    model, _ = tiny("qwen2_5_vl")

    def forward(self: Any, input_ids: Any = None, pixel_values_videos: Any = None) -> None: ...

    model.__class__ = type("Older", (type(model),), {"forward": forward})
    with pytest.raises(ValueError, match=r"expected transformers 5.18 or later, whose Older.forward takes mm_encoder"):
        vmemory.attach(model)
    assert vmemory.attached(model) is None
