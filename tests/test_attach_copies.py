"""A memory in copies of a model, in its pickles and in what it saves."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from torch import nn

import vmemory
from tests.attaching import FAMILIES, SMALL, remembers, with_a_small_memory
from tests.replicas import replicas
from tests.tiny_vlms import tiny


@pytest.fixture(params=FAMILIES)
def small(request: Any) -> Any:
    return with_a_small_memory(request.param)


@pytest.mark.parametrize("memory", [None, "dual"])
def test_a_copy_has_its_own_handle(small, memory):
    model, inputs, logits, answer = small
    plain = model(**inputs).logits
    handle = vmemory.attach(model, memory, SMALL if memory is None else None)
    if memory is None:
        # what a forward with gradients leaves behind must not stand in the way
        model(**inputs)
    other = copy.deepcopy(model)
    own = vmemory.attached(other)
    assert own is not handle
    assert own.model is other
    if memory:
        assert own.memory is other.vmemory
        assert own.memory is not handle.memory
    own.detach()
    assert not hasattr(other, "vmemory")
    assert torch.equal(other(**inputs).logits, plain)
    assert vmemory.attached(model) is handle
    if memory is None:
        assert remembers(model, inputs, logits, answer)


@pytest.mark.parametrize("memory", [None, "dual"])
@torch.no_grad()
def test_a_replica_has_a_memory_and_weights_of_its_own(memory):
    """Of `nn.DataParallel`, which Trainer takes by itself where it sees several devices."""
    model, inputs = tiny("llava_onevision", T=12)
    handle = vmemory.attach(model, memory, SMALL if memory is None else None)
    if memory:
        nn.init.constant_(model.vmemory.alpha, 0.5)
    logits = model(**inputs).logits
    other = replicas(model)[1]
    for weight in model.parameters():
        weight.zero_()
    assert torch.equal(other(**inputs).logits, logits)
    own = vmemory.attached(other)
    assert own.model is other
    assert own is not handle
    assert own.last_prompt
    with own.disabled():
        assert other(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def pickled(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_pickle_remembers(small):
    model, inputs, logits, answer = small
    plain = model(**inputs).logits
    vmemory.attach(model, config=SMALL)
    model(**inputs)
    other = pickled(model)
    assert remembers(other, inputs, logits, answer)
    assert vmemory.attached(other).model is other
    vmemory.attached(other).detach()
    assert torch.equal(other(**inputs).logits, plain)
    assert remembers(model, inputs, logits, answer)


def test_a_saved_model_remembers_by_its_config_alone(small, tmp_path):
    model, inputs, logits, answer = small
    with vmemory.attach(model, config=SMALL | {"max_frames_before_compression": 2}):
        model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    assert vmemory.attached(other) is None
    assert other(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    with vmemory.attach(other) as handle:
        assert handle.config.memory_capacities == (3, 2, 1)
        assert handle.config.max_frames_before_compression == 2
        assert remembers(other, inputs, logits, answer)


def test_learned_weights_travel_in_the_state(tmp_path):
    model, inputs = tiny("qwen2_5_vl", T=6)
    vmemory.attach(model, "dual")
    nn.init.constant_(model.vmemory.alpha, 0.5)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    vmemory.attach(other)
    assert not torch.equal(other(**inputs).logits, logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**inputs).logits, logits)
