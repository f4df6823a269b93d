"""A session over a model whose memory was trained holds what the model was trained with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.attach_oracle import GREEDY
from tests.test_session import T, chunks, question, whole_video
from tests.tiny_vlms import tiny
from vmemory import attach
from vmemory._attach import adapter_of
from vmemory.banks import DualMemory
from vmemory.session import VideoSession

# Qwen3-VL has deepstack features behind its tokens, the others none
FAMILIES = ("qwen3_vl", "qwen2_5_vl", "llava_onevision")
DUAL = {"memory_policy": "dual", "memory_capacities": [2, 4], "memory_rule": "bridged"}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def trained(model, inputs, steps=3):
    """The memory in a model after some steps on its video."""
    memory = model.vmemory
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05)
    for _ in range(steps):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert memory.alpha.abs() > 0.01
    return memory


def watched(model, inputs, n, **settings):
    """A session that saw the video n frames at a time, and the frames it saw, `[T, H, W, C]`."""
    seen = []

    def look(frames, session):
        seen.append(frames.clone())
        return True

    session = VideoSession(model, gate=look, **settings)
    for piece in chunks(inputs, n):
        session.push(**piece)
    return session, torch.cat(seen)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learned", [False, True], ids=["untrained", "trained"])
def test_a_session_holds_what_the_memory_in_the_model_makes(family, learned):
    model, inputs = whole_video(family)
    asked, video_ids = question(family, inputs)
    with attach(model, config=DUAL) as handle:
        memory = trained(model, inputs) if learned else model.vmemory
        # what the model was trained with, frame by frame
        with torch.no_grad():
            whole = handle._prompts.compress_video(iter(adapter_of(model).encode(model, inputs).clips)).tokens
        for n in (1, 5, T):
            session, frames = watched(model, inputs, n)
            assert (frames.shape[-1] > memory.key_dim) == (family == "qwen3_vl")
            with torch.no_grad():
                made = memory.compress(frames).tokens
            held, plain = session.held, frames.flatten(0, 2)
            working, episodic = (held.level == level for level in (0, 1))
            assert held.frame[working].unique().tolist() == [T - 2, T - 1]
            assert len(held.frame[episodic].unique()) == 4
            assert torch.equal(held.tokens[working], plain[held.source[working]])
            if learned:
                assert not torch.isclose(made[:, : memory.key_dim], plain[:, : memory.key_dim]).all()
            if n == T or not learned:
                assert torch.equal(held.tokens[episodic], made[held.source[episodic]])
            # where as many rows are multiplied, to the bit; else products may be summed in another order
            torch.testing.assert_close(held.tokens[episodic], made[held.source[episodic]], rtol=0, atol=1e-6)
            assert torch.equal(made[:, memory.key_dim :], plain[:, memory.key_dim :])
            assert learned or torch.equal(made, plain)
            torch.testing.assert_close(made, whole, rtol=0, atol=1e-5)
            assert session.ask(input_ids=asked, video_ids=video_ids, **GREEDY).sequences.shape[0] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_session_keeps_the_trained_memory(tmp_path, family):
    model, inputs = whole_video(family)
    with attach(model, config=DUAL):
        trained(model, inputs)
        session, _ = watched(model, inputs, 6)
    session.save(tmp_path / "watched.vmem")
    # the file has the weights: nothing is attached any more
    other = VideoSession.load(tmp_path / "watched.vmem", model)
    more = list(chunks(inputs, 6))[1]
    for one in (session, other):
        one.push(**more)
    for a, b in zip(session.held[:-1], other.held[:-1], strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_options_come_from_the_memory_and_sizes_from_the_session():
    model, inputs = tiny("qwen2_5_vl", T=T)
    given = DualMemory(32, (1, 1), (2, 3), heads=2, empty="zeros", rule="bridged", residual=True)
    with attach(model, given):
        torch.nn.init.constant_(given.alpha, 0.5)
        session, frames = watched(model, inputs, 5)
        assert session.memory.to_dict() == given.to_dict() | {"grid": list(frames.shape[1:3])}
        larger, _ = watched(model, inputs, 5, config={"memory_policy": "dual", "memory_capacities": [3, 6]})
        assert larger.memory.to_dict() == session.memory.to_dict() | {"capacity": [3, 6]}
        assert larger.memory.alpha == 0.5
        assert larger.nbytes == larger.memory.nbytes + sum(weight.nbytes for weight in given.parameters())
        by_bytes, _ = watched(model, inputs, 5, config={"memory_policy": "dual", "memory_budget": "128KiB"})
        assert 64 * 1024 < by_bytes.memory.nbytes <= 128 * 1024
        plain, _ = watched(model, inputs, 5, config={"memory_policy": "recent", "memory_capacities": 3})
        assert plain.memory.policy == "recent"
        with pytest.raises(ValueError, match="heads: expected 2, as trained, got 4"):
            watched(model, inputs, 5, config={"memory_policy": "dual", "memory_options": {"heads": 4}})


def test_what_is_trained_later_does_not_reach_a_session_that_watches():
    model, inputs = tiny("qwen2_5_vl", T=T)
    with attach(model, config=DUAL):
        session, frames = watched(model, inputs, 5)
        trained(model, inputs)
        assert session.memory.alpha == 0
        assert torch.equal(session.held.tokens, frames.flatten(0, 2)[session.held.source])


def test_algorithm_1_without_a_share_is_an_option_of_both():
    model, inputs = tiny("qwen2_5_vl", T=T)
    with attach(model, config={**DUAL, "memory_options": {"residual": False}}) as handle:
        session, frames = watched(model, inputs, T)
        assert handle.memory.alpha is session.memory.alpha is None
        held = session.held
        with torch.no_grad():
            made = handle.memory.compress(frames).tokens
        episodic = held.level == 1
        assert torch.equal(held.tokens[episodic], made[held.source[episodic]])
        assert not torch.isclose(made, frames.flatten(0, 2)).any(1).all()


def test_a_memory_under_autocast_watches_in_the_dtype_of_its_weights():
    model, inputs = tiny("qwen2_5_vl", T=T)
    with attach(model, config=DUAL), torch.autocast("cpu", torch.bfloat16):
        memory = trained(model, inputs)
        session, frames = watched(model, inputs, T)
        assert frames.dtype == torch.bfloat16
        assert session.memory.alpha.dtype == session.held.tokens.dtype == torch.float32
        with torch.no_grad():
            made = memory.compress(frames).tokens
        held = session.held
        assert torch.equal(held.tokens[held.level == 0], frames.flatten(0, 2)[held.source[held.level == 0]].float())
        assert torch.equal(held.tokens[held.level == 1], made[held.source[held.level == 1]])


def test_the_copy_that_peft_trains_is_what_watches():
    peft = pytest.importorskip("peft")
    model, inputs = tiny("qwen2_5_vl", T=T)
    handle = attach(model, config=DUAL)
    settings = peft.LoraConfig(r=2, target_modules=["self_attn.q_proj"], modules_to_save=["vmemory"])
    outer = peft.get_peft_model(model, settings)
    with torch.no_grad():
        handle.memory.alpha.fill_(0.75)
    session, _ = watched(outer, inputs, T)
    assert handle._prompts.given.alpha == 0
    assert session.memory.alpha == 0.75
