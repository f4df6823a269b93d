"""A bounded cache in use: generation, observation, released weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.kv_texts import BUDGET, CHUNK, FAMILIES, make, prompt, text_model
from vmemory.kv import POLICIES, KVMemory
from vmemory.kv.cache import new_cache


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_goes_on_within_the_budget(family):
    model, embeds, positions = prompt(family, B=2)
    model.generation_config.eos_token_id = None
    question = torch.randint(3, 180, (2, 3), generator=torch.Generator().manual_seed(4))
    memory, by_hand = make("attention"), make("attention")
    answers = []
    for mine, generate in ((memory, True), (by_hand, False)):
        cache = new_cache(model)
        mine.prefill(model, inputs_embeds=embeds, position_ids=positions, cache=cache, chunk=CHUNK)
        if generate:
            out = mine.generate(model, cache, question, max_new_tokens=9, do_sample=False)
            assert torch.equal(out[:, :3], question)
            answers.append(out[:, 3:])
        else:
            ids, said = question, []
            for _ in range(9):
                ids = mine.prefill(model, ids, cache=cache).output.logits[:, -1].argmax(-1)[:, None]
                said.append(ids)
            answers.append(torch.cat(said, 1))
        assert cache.get_seq_length() == BUDGET
        assert mine.seen == embeds.shape[1] + 3 + 8
    assert torch.equal(*answers)
    assert torch.equal(memory.token, by_hand.token)
    assert torch.equal(memory._next, by_hand._next)


def test_generate_without_eviction_is_the_models_own():
    model = text_model()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 190, (2, 40), generator=torch.Generator().manual_seed(5))
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    for policy in POLICIES:
        memory = make(policy, 400)
        cache = memory.prefill(model, ids[:, :33]).cache
        out = memory.generate(model, cache, ids[:, 33:], max_new_tokens=12, do_sample=False)
        assert torch.equal(out, whole[:, 33:]), policy


def test_observing_leaves_no_trace_and_sees_one_model():
    model, other = text_model(), text_model()
    ids = torch.arange(3, 20)[None]
    before, wanted = dict(ALL_ATTENTION_FUNCTIONS), model(ids).logits
    memory = KVMemory(64, "attention")
    with memory.observing(model):
        other(ids)
        assert not memory._queries
        assert torch.equal(model(ids).logits, wanted)
        assert sorted(memory._queries) == [0, 1, 2]
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def test_two_memories_may_observe_two_models():
    models = text_model(), text_model("qwen2")
    memories = KVMemory(64, "attention"), KVMemory(64, "attention")
    ids = torch.arange(3, 20)[None]
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with memories[0].observing(models[0]), memories[1].observing(models[1]):
        for model, memory in zip(models, memories, strict=True):
            cache = model(ids, use_cache=True).past_key_values
            assert memory.update(cache).shape == (3, 1, 2, 17)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.assets
@pytest.mark.slow
def test_real_weights_lose_less_by_attention_than_by_recency():
    from benchmarks import kv_quality
    from benchmarks.smollm2 import SMOLLM2
    from vmemory.encoders.assets import AssetError, locate

    try:
        locate(SMOLLM2)
    except AssetError as missing:
        pytest.skip(str(missing))
    rows = kv_quality.measure("topic strings", 512, 0.25, ["recent", "attention"], 64)
    recent, attention = sorted(rows, key=lambda row: row["policy"], reverse=True)
    assert attention["rows"] == recent["rows"] == 128
    assert attention["agreement"] > recent["agreement"]
    assert attention["divergence"] < recent["divergence"]
