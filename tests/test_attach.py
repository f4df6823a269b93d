"""The contract of a memory in a model: every family with every policy. `--matrix` runs them all."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from tests.attach_oracle import MIXES, RECURRENT, double, generated, logits_of, masked_inputs
from tests.tiny_vlms import FAMILIES, SIDE, tiny
from vmemory import attach, attached, compress_inputs
from vmemory._attach import MemoryHandle
from vmemory.banks import POLICIES

# the first family runs with every policy, every family with the first three
QUICK_FAMILY, QUICK_POLICIES = "video_llama_3", ("hierarchical", "merging", "dual")
PAIRS = [(family, policy) for family in FAMILIES for policy in POLICIES]
QUICK = {(f, p) for f, p in PAIRS if f == QUICK_FAMILY or p in QUICK_POLICIES}
BATCHES = [(1, True), (2, True), (2, False)]

# models rotate and normalise in float32 whatever they are given; a wrong token is off by 1e-2
FLOAT32 = 1e-6

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def pairs(*without: str, families: tuple[str, ...] = ()):
    chosen = [(f, p) for f, p in PAIRS if p not in without and f not in families]
    marks = [() if pair in QUICK else (pytest.mark.matrix,) for pair in chosen]
    return pytest.mark.parametrize(
        ("family", "policy"),
        [pytest.param(*pair, id="-".join(pair), marks=m) for pair, m in zip(chosen, marks, strict=True)],
    )


def everything(policy: str) -> dict:
    """Settings under which nothing is dropped."""
    capacities = {"hierarchical": [100], "dual": [3, 5]}.get(policy, 100)
    sizes = [None] if policy == "hierarchical" else None
    return {"memory_policy": policy, "memory_capacities": capacities, "memory_reduced_sizes": sizes}


def selecting(policy: str) -> dict:
    """Settings under which some frames go and the others stay as they are."""
    if policy == "hierarchical":
        return {"memory_capacities": [3, 2], "memory_reduced_sizes": [None, None]}
    return {"memory_policy": policy, "memory_capacities": 4}


@pairs()
def test_a_memory_that_holds_everything_changes_nothing_to_the_bit(family, policy):
    for B, left in BATCHES:
        model, inputs = tiny(family, B=B, left=left)
        plain = logits_of(model, inputs)
        spoken = generated(model, inputs) if left else None
        with attach(model, config=everything(policy)) as handle:
            assert torch.equal(logits_of(model, inputs), plain)
            assert len(handle.last_prompt) == B
            if left:
                for own, ours in zip(spoken, generated(model, inputs), strict=True):
                    assert torch.equal(own, ours)


@pairs(*MIXES, families=RECURRENT)
def test_a_memory_that_selects_equals_masking_the_rest(family, policy):
    for B, left in BATCHES:
        model, inputs = tiny(family, B=B, left=left)
        # torch multiplies grouped experts in 32 bits at most
        experts = "moe" in family
        if not experts:
            model, inputs = double(model, inputs)
        bound = 10 * FLOAT32 if experts else FLOAT32
        with attach(model, config=selecting(policy)) as handle:
            ours = logits_of(model, inputs)
            new = handle._prompts.compress_prompt(dict(inputs), False)
            spoken = generated(model, inputs) if left else None
            wanted = masked_inputs(model, handle, inputs, new.keep)
        assert all(0 < len(k.source) < k.tokens_before for k in new.videos)
        theirs = logits_of(model, wanted)
        torch.testing.assert_close(ours[new.keep], theirs[new.keep], rtol=0, atol=bound)
        if left:
            sequences, logits = generated(model, wanted)
            assert torch.equal(spoken[0], sequences)
            torch.testing.assert_close(spoken[1], logits, rtol=0, atol=bound)


@pairs()
def test_generate_gives_the_prompt_back(family, policy):
    model, inputs = tiny(family, B=2)
    tight = {"hierarchical": [2, 1, 1], "dual": [2, 2]}.get(policy, 2)
    with attach(model, config={"memory_policy": policy, "memory_capacities": tight}):
        for more in ({}, {"num_beams": 2}, {"do_sample": True}):
            out = model.generate(**inputs, max_new_tokens=3, pad_token_id=0, eos_token_id=None, **more)
            assert torch.equal(out[:, :-3], inputs["input_ids"])


@pairs()
def test_gradients_reach_tower_and_memory(family, policy):
    model, inputs = tiny(family)
    tight = {"hierarchical": [2, 1, 1], "dual": [2, 2]}.get(policy, 2)
    labels = inputs["input_ids"].clone()
    with attach(model, config={"memory_policy": policy, "memory_capacities": tight}) as handle:
        if policy == "dual":
            model.vmemory.alpha.data.fill_(0.5)
        model(**inputs, labels=labels).loss.backward()
        if policy == "dual":
            assert all(p.grad is not None for p in handle.memory.parameters())
    seeing = [p for name, p in model.named_parameters() if any(s in name for s in ("visual", "vision", "projector"))]
    # heads that the language model does not look at stay without
    reached = [p for p in seeing if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert len(reached) > 0.6 * len(seeing)


@pairs()
def test_detach_leaves_no_trace(family, policy):
    model, inputs = tiny(family)
    # what the model keeps between calls is its own
    plain = logits_of(model, inputs)
    before = (set(model.__dict__), dict(model.config.__dict__), list(model.state_dict()), dict(model.named_modules()))
    handle = attach(model, config={"memory_policy": policy, "memory_capacities": {"dual": [2, 2]}.get(policy, [2])})
    assert attached(model) is handle
    assert any(name.startswith("vmemory.") for name in model.state_dict()) == (policy == "dual")
    model(**inputs)
    with handle.disabled():
        assert torch.equal(logits_of(model, inputs), plain)
    twin = copy.deepcopy(model)
    handle.detach()
    after = (set(model.__dict__), dict(model.config.__dict__), list(model.state_dict()), dict(model.named_modules()))
    assert before == after
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.equal(logits_of(model, inputs), plain)
    assert isinstance(attached(twin), MemoryHandle)
    attached(twin).detach()
    assert torch.equal(logits_of(twin, inputs), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_in_pieces_is_the_tower(family):
    model, inputs = tiny(family, T=7, B=2)
    settings = {"memory_capacities": [3, 2, 1]}
    whole = compress_inputs(model, inputs, config=settings)
    pieces = compress_inputs(model, inputs, config={**settings, "memory_chunk_frames": 3})
    assert torch.equal(whole["input_ids"], pieces["input_ids"])
    (one,), (other,) = whole["mm_encoder_outputs"].values(), pieces["mm_encoder_outputs"].values()
    for a, b in zip(one.pooler_output, other.pooler_output, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_videos_pass_untouched(family):
    model, inputs = tiny(family, T=5)
    plain = logits_of(model, inputs)
    for chunk in (None, 2):
        settings = {"memory_capacities": [1], "memory_chunk_frames": chunk}
        with attach(model, config={**settings, "max_frames_before_compression": 5}):
            torch.testing.assert_close(logits_of(model, inputs), plain, rtol=0, atol=0 if chunk is None else 1e-5)
        with attach(model, config={**settings, "max_frames_before_compression": 4}):
            assert compress_inputs(model, inputs)["input_ids"].shape[1] < plain.shape[1]
            assert not torch.allclose(logits_of(model, inputs), plain, rtol=0, atol=1e-5)


def test_tokens_do_not_grow_with_the_video():
    lengths = set()
    for T in (10, 20, 40):
        model, inputs = tiny("qwen2_5_vl", T=T)
        new = compress_inputs(model, inputs, config={"memory_capacities": [3, 2, 1]})
        lengths.add(new["input_ids"].shape[1])
        grown = {"video_grid_thw": inputs["video_grid_thw"], "tokens": 3 * SIDE**2 + 2 * (SIDE // 2) ** 2 + 1}
        assert int((new["input_ids"] == 191).sum()) == grown["tokens"]
    assert len(lengths) == 1
