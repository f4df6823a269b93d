"""What a bounded cache refuses, with nothing changed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.kv_texts import text_model
from tests.tiny_vlms import tiny
from vmemory.kv import KVMemory
from vmemory.kv.cache import new_cache


def test_caches_without_plain_rows_are_refused():
    model, inputs = tiny("qwen3_5", T=2)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    model.model.language_model(input_ids=inputs["input_ids"], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="layer 0 is a LinearAttentionLayer"):
        KVMemory(16, "recent").update(cache)
    sliding = text_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    cache = new_cache(sliding)
    sliding(torch.arange(3, 20)[None], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="layer 1 is a DynamicSlidingWindowLayer"):
        KVMemory(16, "recent").update(cache)
    for empty in (transformers.DynamicCache(), None):
        with pytest.raises(ValueError, match="got an empty one"):
            KVMemory(16, "recent").update(empty)


def test_a_refused_update_changes_nothing():
    model = text_model()
    ids = torch.arange(3, 60)[None]
    memory = KVMemory(20, "attention")
    cache = memory.prefill(model, ids).cache
    token, keys = memory.token, cache.layers[0].keys
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, position_ids=torch.arange(57, 61)[None])
    grown = cache.layers[0].keys
    for arguments, message in ({}, r"within memory.observing\(model\)"), ({"span": 5}, "20 rows of before and 5 new"):
        with pytest.raises(ValueError, match=message):
            memory.update(cache, **arguments)
        assert memory.token is token
        assert memory.seen == 57
        assert cache.layers[0].keys is grown
    assert torch.equal(grown[:, :, :20], keys)
    with pytest.raises(ValueError, match=r"expected decisions \[3, 1, 2\] as before"):
        memory.update(model(ids.expand(2, -1), use_cache=True).past_key_values)
    frames = KVMemory(40, "similar", span=8)
    with pytest.raises(ValueError, match="at most span=8 rows in a frame, got 20"):
        frames.prefill(model, ids[:, :20], time=0.0)
    assert frames.seen == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "newest"}, ValueError, "policy: expected one of 'attention'"),
        ({"share": "row"}, ValueError, "share: expected one of"),
        ({"budget": 4}, ValueError, "budget: expected more rows than the 4 sinks, got 4"),
        ({"budget": 0}, ValueError, "budget: expected at least 1"),
        ({"budget": 2.5}, TypeError, "budget: expected an int"),
        ({"budget": "lots"}, ValueError, "budget: expected a size"),
        ({"sinks": -1}, ValueError, "sinks: expected at least 0"),
        ({"recent": 1.5}, ValueError, "recent: expected a share"),
        ({"half_life": 0}, ValueError, "half_life: expected a positive"),
        ({"window": 0}, ValueError, "window: expected at least 1"),
        ({"span": 4}, TypeError, "span: expected an option of 'attention', recent, half_life, window, by_value"),
        ({"rule": "recent", "policy": "similar"}, TypeError, "rule: expected an option of 'similar', span, thin"),
        ({"window": 2.5}, TypeError, "window: expected an int"),
        ({"policy": "similar", "budget": 30}, ValueError, "budget: expected at least 36 rows for spans of 16"),
        ({"policy": "similar", "span": 0}, ValueError, "span: expected at least 1"),
        ({"policy": "hierarchical", "thin": (2, 4)}, ValueError, "thin: expected 1 and"),
        ({"policy": "hierarchical", "thin": (1, 4, 6)}, ValueError, "thin: expected each number"),
        ({"policy": "reservoir", "seed": -1}, ValueError, "seed: expected between"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        KVMemory(**{"budget": 64} | arguments)


def test_inputs_are_checked():
    model, memory, ids = text_model(), KVMemory(32, "recent"), torch.arange(3, 13)[None]
    for arguments, message in (
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids[0]}, r"input_ids: expected \[B, N\]"),
        ({"inputs_embeds": ids}, r"inputs_embeds: expected \[B, N, C\]"),
        ({"input_ids": ids, "position_ids": ids[:, 1:]}, "position_ids: expected"),
        ({"input_ids": ids, "chunk": 0}, "chunk: expected at least 1"),
        ({"input_ids": ids[:, :0]}, "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.prefill(model, **arguments)
    with pytest.raises(ValueError, match="prefill comes first"):
        memory.generate(model, new_cache(model), ids)
    cache = memory.prefill(model, ids).cache
    with pytest.raises(ValueError, match="num_beams: expected 1"):
        memory.generate(model, cache, ids, num_beams=2)
    with pytest.raises(ValueError, match="at least one token"):
        memory.generate(model, cache, ids[:, :0])
    with pytest.raises(ValueError, match="found no attention in Linear"):
        KVMemory(32).prefill(torch.nn.Linear(1, 1), ids, cache=cache)
