"""What a session shows of a short stream, forgets on demand, and accepts as its memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import vmemory
from tests.test_session_words import film
from tests.tiny_vlms import tiny
from tests.tiny_words import byte_words
from vmemory.session import VideoSession

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def assert_same(one, two):
    for name in ("tokens", "time", "cell", "source"):
        assert torch.equal(getattr(one.held, name), getattr(two.held, name)), name


@pytest.mark.parametrize("policy", ["hierarchical", "merging"])
def test_a_short_stream_is_shown_whole(tmp_path, policy):
    model, _ = tiny("qwen2_5_vl")
    settings = {"memory_policy": policy, "memory_capacities": [2, 1]}
    short = VideoSession(model, config={**settings, "max_frames_before_compression": 5})
    plain, whole = VideoSession(model, config=settings), VideoSession(model, memory="recent")
    frames = film(14)
    for first in range(0, 10, 2):
        for session in (short, plain, whole):
            session.push(frames[first : first + 2])
        assert_same(short, whole)
        assert short.num_tokens == whole.num_tokens
        held = short.nbytes
        assert held > short.memory.nbytes
        short.save(tmp_path / "short.vmem")
        short = VideoSession.load(tmp_path / "short.vmem", model)
        assert short.nbytes == held
    assert plain.num_tokens < whole.num_tokens
    for session in (short, plain):
        session.push(frames[10:14])
    assert_same(short, plain)
    assert short.nbytes == plain.nbytes
    short.reset()
    whole.reset()
    for session in (short, whole):
        session.push(frames[4:8])
    assert_same(short, whole)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_nothing_of_an_erased_span_is_left(family):
    model, _ = tiny(family)
    words, frames = byte_words(), film(13)
    settings = {"memory_policy": "recent", "memory_capacities": 8, "max_frames_before_compression": 20}
    session = VideoSession(model, words, config=settings, fps=2.0)
    session.push(frames)
    session.ask("what happens?", **GREEDY)
    before = session.held
    # frames 5 and 6 are the second of one pair and the first of the next
    session.erase(2.5, 3.0)
    # the prompt's cache, too, was made of these frames
    assert session.nbytes == session.memory.nbytes + session._short_stream.nbytes
    gone = (
        torch.tensor([2.0, 2.5, 3.0, 3.5])
        if session.adapter.temporal_patch_size(model) == 2
        else torch.tensor([2.5, 3])
    )
    if family == "qwen3_vl":
        gone = torch.tensor([2.25, 3.25])
    left = ~torch.isin(before.time, gone.double())
    assert 0 < int(left.sum()) < len(left)
    assert torch.equal(session.held.tokens, before.tokens[left])
    assert set(session.memory.read().time.tolist()).isdisjoint(gone.tolist())
    assert isinstance(session.ask("what happens?", **GREEDY), str)
    assert len(session._waiting) == (13 % session.adapter.temporal_patch_size(model))
    session.erase(5.9, 6.1)
    assert not session._waiting
    assert not bool((session.held.time > 5.5).any())
    with pytest.raises(ValueError, match="t0: expected at most t1"):
        session.erase(3.0, 2.0)


def test_what_a_session_takes_as_its_memory():
    model, _ = tiny("llava_onevision")
    made = []

    def make(dim, grid, key_dim, device, dtype):
        made.append((dim, grid, key_dim))
        return vmemory.banks.RecentBank(dim, grid, 3, device=device, dtype=dtype)

    sessions = [
        VideoSession(model, None, "recent", {"memory_capacities": 3}),
        VideoSession(model, memory=make),
        VideoSession(model, memory=vmemory.banks.RecentBank(32, (4, 4), 3)),
    ]
    for session in sessions:
        session.push(film(5))
        assert_same(session, sessions[0])
    assert made == [(32, (4, 4), 32)]

    class Compresses:
        def compress(self, clip, time=None, mask=None):
            raise AssertionError("a session has no whole clip")

    for wrong in (Compresses(), 5, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="memory: expected a policy's name, a bank, or a function"):
            VideoSession(model, memory=wrong)
    with pytest.raises(ValueError, match="memory_policy: expected one of"):
        VideoSession(model, memory="recen")
