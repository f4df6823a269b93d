"""What a bounded cache holds: full attention under a mask, row for row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.kv_texts import BUDGET, CHUNK, FAMILIES, LENGTH, SPANS, make, prompt, text_model
from vmemory.banks import HierarchicalBank
from vmemory.kv import POLICIES, KVMemory
from vmemory.kv.cache import new_cache
from vmemory.testing import assert_within_budget


def streamed(memory: KVMemory, model, embeds, positions, chunk: int = CHUNK):
    """Logits of all tokens, and for each chunk its first token and the tokens held before it."""
    cache, held, logits = new_cache(model), [], []
    for start in range(0, embeds.shape[1], chunk):
        held.append((start, memory.token if memory.seen else None))
        part = slice(start, start + chunk)
        step = memory.prefill(
            model, inputs_embeds=embeds[:, part], position_ids=positions[..., part], cache=cache, chunk=chunk
        )
        logits.append(step.output.logits)
    return torch.cat(logits, 1), held


def visible(held, layers: int, heads: int, B: int, N: int) -> torch.Tensor:
    """`[L, B, G, N, N]` bool: what each query was shown."""
    mask = torch.zeros(layers, B, heads, N, N, dtype=torch.bool)
    for i, (start, tokens) in enumerate(held):
        stop = held[i + 1][0] if i + 1 < len(held) else N
        mask[..., start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        if tokens is not None:
            row = torch.zeros(layers, B, heads, N, dtype=torch.bool)
            row.scatter_(3, tokens.expand(layers, B, heads, -1), True)
            mask[..., start:stop, :] |= row[..., None, :]
    return mask


def masked_full(model, embeds, positions, mask, monkeypatch, through_model: bool):
    """Logits of one pass of full attention under a mask: the model's own argument, or one mask a layer and head."""
    bias = torch.zeros(mask.shape, dtype=embeds.dtype).masked_fill_(~mask, torch.finfo(embeds.dtype).min)
    with torch.no_grad():
        if through_model:
            return model(
                inputs_embeds=embeds, position_ids=positions, attention_mask=bias[0, :, :1], use_cache=False
            ).logits
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attend(module, query, key, value, attention_mask, **kwargs):
            each = bias[module.layer_idx].repeat_interleave(query.shape[1] // mask.shape[2], 1)
            return original(module, query, key, value, each, **kwargs)

        with monkeypatch.context() as patch:
            patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
            return model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits


CASES = [(family, policy, None) for family in FAMILIES for policy in POLICIES]
CASES += [("llama", policy, share) for policy in ("attention", "similar") for share in ("cache", "layer", "head")]


@pytest.mark.parametrize(("family", "policy", "share"), CASES)
def test_equals_full_attention_under_the_mask_of_what_was_held(family, policy, share, monkeypatch):
    model, embeds, positions = prompt(family, B=2 if family == "llama" else 1)
    if family == "llama":
        embeds = embeds.clone()
    memory = make(policy, share=share)
    out, held = streamed(memory, model, embeds, positions)
    B, N = embeds.shape[:2]
    assert memory.seen == N > 2 * BUDGET
    mask = visible(held, 3, 2, B, N)
    assert not mask[..., -1, :].all(), "nothing was evicted"
    shared = memory.share == "cache"
    low = masked_full(model, embeds, positions, mask, monkeypatch, shared)
    wide = masked_full(model.double(), embeds.double(), positions, mask, monkeypatch, shared)
    assert_within_budget(out, low, wide)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_rows_are_bounded_and_known(policy, chunk):
    model, embeds, positions = prompt("llama", B=2)
    memory = make(policy)
    whole = model(inputs_embeds=embeds, position_ids=positions, use_cache=True).past_key_values.layers[0]
    for cache, _ in memory.stream(model, inputs_embeds=embeds, position_ids=positions, chunk=chunk):
        rows = {layer.keys.shape[2] for layer in cache.layers} | {layer.values.shape[2] for layer in cache.layers}
        assert rows == {memory.token.shape[3]}
        assert memory.token.shape[3] <= BUDGET
        assert (memory.token.diff(dim=3) > 0).all()
        assert (memory.token[..., : memory.sinks] == torch.arange(min(memory.sinks, memory.seen))).all()
    assert memory.token.shape[3] > BUDGET // 2
    # the first layer's keys and values know nothing of an eviction: each row is the token it says
    at = memory.token[0].expand(2, 2, -1)[..., None].expand(-1, -1, -1, 8)
    torch.testing.assert_close(cache.layers[0].keys, whole.keys.gather(2, at), rtol=0, atol=1e-5)
    torch.testing.assert_close(cache.layers[0].values, whole.values.gather(2, at), rtol=0, atol=1e-5)


def test_keep_index_names_rows_of_the_cache_as_it_came():
    model, embeds, _ = prompt("llama")
    memory = make("recent", 10)
    cache = memory.prefill(model, inputs_embeds=embeds[:, :10]).cache
    before = cache.layers[1].keys
    with torch.no_grad():
        model(inputs_embeds=embeds[:, 10:13], past_key_values=cache, position_ids=torch.arange(10, 13)[None])
    index = memory.update(cache, 3)
    assert index.flatten().tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert torch.equal(cache.layers[1].keys[:, :, :7], before[:, :, [0, 1, 2, 3, 7, 8, 9]])
    assert memory.update(cache).flatten().tolist() == list(range(10))


def test_entries_of_a_batch_decide_alone():
    model, embeds, positions = prompt("llama", B=3)
    for policy in POLICIES:
        together = make(policy)
        streamed(together, model, embeds, positions)
        for b in range(3):
            alone = make(policy)
            streamed(alone, model, embeds[b : b + 1], positions[:1])
            assert torch.equal(together.token[:, b : b + 1], alone.token), policy


@pytest.mark.parametrize("policy", ["recent", "reservoir", *SPANS])
def test_what_is_held_does_not_depend_on_the_chunks(policy):
    model, embeds, positions = prompt("llama")
    tokens = []
    for chunk in (1, 5, 12):
        memory = make(policy)
        streamed(memory, model, embeds, positions, chunk)
        tokens.append(memory.token)
    # deeper values see evictions at other times, so spans decide alike only where they look at the number alone
    if policy in ("similar", "hierarchical"):
        assert {t.shape for t in tokens} == {tokens[0].shape}
    else:
        assert all(torch.equal(t, tokens[0]) for t in tokens)


def test_reservoir_draws_by_seed_and_fairly():
    model, embeds, positions = prompt("llama")
    held = torch.zeros(LENGTH)
    for seed in range(60):
        memory = make("reservoir", 30, seed=seed, recent=0.0, sinks=0)
        streamed(memory, model, embeds, positions, 30)
        held[memory.token.flatten()] += 1
    # 15 expected of 60 in each place, deviation 3.4
    assert held[: LENGTH // 2].sum() == pytest.approx(60 * 30 / 2, rel=0.1)
    assert held.max() < 30
    assert held.min() > 2


def test_spans_leave_as_the_bank_decides():
    model, embeds, positions = prompt("llama")
    memory = make("similar", budget=4 + 6 + 5 * 6)
    streamed(memory, model, embeds, positions, LENGTH)
    full = model(inputs_embeds=embeds, position_ids=positions, use_cache=True).past_key_values
    values = torch.cat([layer.values[0].transpose(0, 1).flatten(1) for layer in full.layers], 1).detach()
    spans = values[4 : 4 + 19 * 6].view(19, 6, -1).mean(1)
    bank = HierarchicalBank(dim=spans.shape[-1], grid=(1, 1), capacity=(5,), grid_size=((1, 1),), rule="paper")
    bank.push(spans.view(19, 1, 1, -1))
    assert ((memory.token[0, 0, 0, 4:-2] - 4) // 6)[::6].tolist() == bank.read().frame.tolist()
    assert memory.token[0, 0, 0, -2:].tolist() == [118, 119], "the open span stays"


def test_old_spans_are_thinned():
    model, embeds, positions = prompt("llama")
    memory = KVMemory(4 + 8 + 3 * 16, "hierarchical", span=8, thin=(1, 2, 8))
    streamed(memory, model, embeds, positions, 10)
    place = memory.token[0, 0, 0, 4:] - 4
    rows = (place // 8).bincount()
    assert rows.tolist()[-1] == 4, "the open span stays whole"
    assert rows[:-1].bincount(minlength=9)[[8, 4]].tolist() == [2, 4], "16 rows a tier"
    assert set(rows[:-1].tolist()) == {1, 4, 8}
    kept = place[torch.isin(place // 8, (rows[:-1] == 4).nonzero())] % 8
    assert set(kept.tolist()) == {0, 2, 4, 6}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_received_is_that_of_the_model(implementation):
    model = text_model(attn_implementation="eager")
    ids = torch.randint(3, 190, (2, 30), generator=torch.Generator().manual_seed(3))
    weights = torch.stack(model(ids, output_attentions=True).attentions).detach()
    model.set_attn_implementation(implementation)
    memory = KVMemory(64, "attention", half_life=float("inf"))
    memory.prefill(model, ids, chunk=7)
    wanted = weights.sum(3).view(3, 2, 2, 2, 30).mean(3)
    torch.testing.assert_close(memory.rule.received, wanted, rtol=0, atol=1e-5)
    faded = KVMemory(64, "attention", half_life=10.0)
    faded.prefill(model, ids, chunk=10)
    halves = torch.tensor([0.25, 0.5, 1.0]).repeat_interleave(10)[:, None]
    wanted = (weights * halves).sum(3).view(3, 2, 2, 2, 30).mean(3)
    torch.testing.assert_close(faded.rule.received, wanted, rtol=0, atol=1e-5)


def test_rows_that_get_attention_stay():
    memory, model = KVMemory(20, "attention", recent=0.25, half_life=float("inf"), share="cache"), text_model()
    ids = torch.randint(3, 190, (1, 60), generator=torch.Generator().manual_seed(3))
    memory.prefill(model, ids, chunk=60)
    with memory.observing(model):
        model(ids, use_cache=True)
    scores = KVMemory(64, "attention", half_life=float("inf"), share="cache")
    scores.prefill(model, ids, chunk=60)
    received = scores.rule.received[0, 0, 0].clone()
    received[:4] = received[-4:] = torch.inf
    assert memory.token[0, 0, 0].tolist() == received.topk(20).indices.sort().values.tolist()


def test_keys_unlike_the_mean_stay():
    cache, memory = transformers.DynamicCache(), KVMemory(3, "keys", sinks=0, recent=0.0)
    key = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.0], [1.0, -0.1], [0.0, 5.0], [9.0, 0.0], [0.0, -1.0]])
    cache.update(key[None, None], key[None, None], 0)
    assert memory.update(cache).flatten().tolist() == [2, 4, 6]


def test_a_row_that_is_not_finite_leaves_first():
    cache, memory = transformers.DynamicCache(), KVMemory(6, "keys", sinks=0, recent=0.0)
    key = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    key[0, 0, 2] = torch.nan
    cache.update(key, key, 0)
    assert memory.update(cache).flatten().tolist() == [0, 1, 3, 4, 5, 6]


def test_a_budget_in_bytes_bounds_keys_and_values():
    model, embeds, positions = prompt("llama", B=2)
    row = 3 * 2 * 2 * 2 * 8 * 4  # layers, key and value, batch, heads, channels, float32
    memory = make("recent", f"{30 * row + 5}B")
    cache = memory.prefill(model, inputs_embeds=embeds, position_ids=positions).cache
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 30 * row
    with pytest.raises(ValueError, match="budget: expected more rows than the 4 sinks"):
        make("recent", "10B").prefill(model, inputs_embeds=embeds)


@pytest.mark.parametrize("policy", SPANS)
def test_frames_are_spans_and_keep_their_times(policy):
    model, embeds, positions = prompt("qwen2_5_vl")
    memory, cache = KVMemory(60, policy, span=16, thin=(1, 2)), new_cache(model)
    for part, time in [(slice(0, 5), None), *((slice(5 + 12 * k, 17 + 12 * k), 0.5 * k) for k in range(7))]:
        at = positions[..., part]
        memory.prefill(model, inputs_embeds=embeds[:, part], position_ids=at, cache=cache, time=time)
    token, time = memory.token[0, 0, 0], memory.time[0, 0, 0]
    frame = torch.div(token - 5, 12, rounding_mode="floor")
    assert torch.equal(time[token >= 5], 0.5 * frame[token >= 5].double())
    assert time[token < 5].isnan().all()
    counts = frame[token >= 5].bincount()
    assert set(counts.tolist()) <= {0, 6, 12}
    assert counts[-1] == 12
