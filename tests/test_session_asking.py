"""Questions at any moment and of any kind, frames of any layout, clocks of any kind."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import vmemory
from tests.test_session_words import film
from tests.tiny_vlms import FAMILIES, tiny
from tests.tiny_words import byte_words
from vmemory.banks import BankFileError
from vmemory.session import VideoSession

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SMALL = {"memory_capacities": [3, 2, 1]}
PAIRED, SINGLE = "qwen2_5_vl", "llava_onevision"
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def words():
    return byte_words()


def same_prompt(one, two):
    a, b = one.prompt("what happens?"), two.prompt("what happens?")
    (x,), (y,) = a.pop("mm_encoder_outputs").values(), b.pop("mm_encoder_outputs").values()
    same = all(torch.equal(a[name], b[name]) for name in a)
    return same and all(torch.equal(p, q) for p, q in zip(x.pooler_output, y.pooler_output, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wall_clock_counts_from_the_first_frame(words, family, tmp_path):
    model, _ = tiny(family)
    zero, wall = (VideoSession(model, words, config=SMALL, time_origin=origin) for origin in (0.0, "start"))
    frames, seconds = film(12), np.arange(12) / 2
    now = 1764500000.25
    zero.push(frames, seconds)
    wall.push(frames, seconds + now)
    assert same_prompt(zero, wall)
    assert float(wall.held.time.min()) >= now
    wall.save(tmp_path / "wall.vmem")
    assert same_prompt(zero, VideoSession.load(tmp_path / "wall.vmem", model, words))
    # and every entry of the same frames has a place of its own
    rows = wall.prompt("what happens?").get("position_ids")
    if rows is not None:
        assert int(rows.max()) < 1000


def test_times_too_far_from_their_origin(words):
    model, _ = tiny(PAIRED)
    session = VideoSession(model, words, config=SMALL, time_origin=0.0)
    session.push(film(2), [1764500000.0, 1764500001.0])
    with pytest.raises(ValueError, match="time_origin: expected positions up to 16777216, got 35290"):
        session.prompt("what happens?")
    session = VideoSession(model, words, config=SMALL, time_origin=9.0)
    session.push(film(2))
    with pytest.raises(ValueError, match=r"time_origin: expected at most the oldest entry's second, 0.0, got 9.0"):
        session.prompt("what happens?")
    for origin in (float("nan"), "end"):
        with pytest.raises(ValueError, match="time_origin: expected"):
            VideoSession(model, time_origin=origin)


@pytest.mark.parametrize("family", [PAIRED, "qwen3_vl", SINGLE])
@pytest.mark.parametrize("memory", ["hierarchical", "dual"])
def test_a_frame_that_waits_for_its_pair_is_seen_as_if_it_came_twice(words, family, memory):
    model, _ = tiny(family)
    new = {"memory": memory, "config": {"max_frames_before_compression": 2}}
    frames = film(11)
    asked, never = VideoSession(model, words, **new), VideoSession(model, words, **new)
    together = asked.adapter.temporal_patch_size(model)
    for n in range(11):
        asked.push(frames[n], float(n))
        never.push(frames[n], float(n))
        twice = VideoSession(model, words, **new)
        twice.push(frames[: n + 1], [float(t) for t in range(n + 1)])
        if twice._waiting:
            # a time just behind, which text and positions round away
            twice.push(frames[n], n + 1e-6)
        assert same_prompt(asked, twice)
        calls = asked.tower.calls
        assert isinstance(asked.ask("what happens?", **GREEDY), str)
        assert asked.tower.calls == calls
    # each frame that waited once more, beside the pairs
    assert asked.tower.calls == (11 if together == 1 else 5 + 6)
    assert torch.equal(asked.memory.read().tokens, never.memory.read().tokens)
    assert same_prompt(asked, never)
    asked.reset()
    with pytest.raises(ValueError, match="session: expected frames before a question"):
        asked.ask("what happens?")


def test_arrays_of_every_layout(words):
    model, _ = tiny(PAIRED)
    frames = film(4).permute(0, 2, 3, 1).numpy()
    read_only = frames.copy()
    read_only.setflags(write=False)
    wanted = VideoSession(model, words, config=SMALL)
    wanted.push(frames)
    for layout in (
        np.ascontiguousarray(frames[..., ::-1])[..., ::-1], np.ascontiguousarray(frames[:, ::-1])[:, ::-1],
        np.asfortranarray(frames), read_only, np.repeat(frames, 2, 1)[:, ::2],
        [frame[..., ::-1] for frame in np.ascontiguousarray(frames[..., ::-1])],
    ):  # fmt: skip
        session = VideoSession(model, words, config=SMALL)
        session.push(layout, np.arange(4.0)[::-1][::-1])
        assert torch.equal(session.held.tokens, wanted.held.tokens)


@pytest.mark.parametrize("family", [PAIRED, SINGLE, "video_llama_3", "qwen3_5"])
def test_beams_several_answers_and_other_caches(words, family):
    model, _ = tiny(family)
    kept, anew = (VideoSession(model, words, config=SMALL, reuse_prefix=reuse) for reuse in (True, False))
    for session in (kept, anew):
        session.push(film(8))
    for more in (
        {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"},
        {"use_cache": False}, {},
    ):  # fmt: skip
        if family == "qwen3_5" and "cache_implementation" in more:
            continue  # its linear layers have no static cache
        one, two = (session.ask("what happens?", **GREEDY, **more) for session in (kept, anew))
        assert one == two
        assert isinstance(one, list) == ("num_return_sequences" in more)
    torch.manual_seed(0)
    sampled = kept.ask("what happens?", **{**GREEDY, "do_sample": True}, num_return_sequences=3)
    assert len(sampled) == 3
    assert len(set(sampled)) > 1


def test_an_offloaded_model(words, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, _ = tiny(PAIRED)
    plain = VideoSession(model, words, config=SMALL)
    plain.push(film(8))
    answer = plain.ask("what happens?", **GREEDY)
    plain.save(tmp_path / "plain.vmem")
    off = accelerate.cpu_offload(tiny(PAIRED)[0], execution_device="cpu")
    session = VideoSession(off, words, config=SMALL)
    session.push(film(8))
    for watching in (session, VideoSession.load(tmp_path / "plain.vmem", off, words)):
        assert watching.ask("what happens?", **GREEDY) == answer


def test_a_stream_that_another_model_saw(words, tmp_path):
    model, _ = tiny(PAIRED)
    session = VideoSession(model, words, config=SMALL)
    session.push(film(4))
    session.save(tmp_path / "a.vmem")
    for other in (SINGLE, "qwen2_vl"):
        with pytest.raises(
            BankFileError, match=f"holds what a model of type 'qwen2_5_vl' saw, got one of type '{other}'"
        ):
            VideoSession.load(tmp_path / "a.vmem", tiny(other)[0], words)
    wider, _ = tiny(PAIRED)
    config = wider.config
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 48
    session.model = type(wider)(config)
    with pytest.raises(BankFileError, match=r"session: expected tokens \[4, 4, 48\] of this model, got \[4, 4, 32\]"):
        session.resume(tmp_path / "a.vmem")


def test_what_is_refused_by_name(words, tmp_path):
    model, _ = tiny(PAIRED)
    session = VideoSession(model, words, config=SMALL)
    frames = film(2)
    moment = datetime.datetime(2026, 1, 1)
    for error, arguments, message in (
        (
            TypeError,
            {"frames": "film.mp4"},
            r"frames: expected frames, got 'film.mp4'; vmemory.sources.FrameSource reads",
        ),
        (TypeError, {"frames": tmp_path / "film.mp4"}, "vmemory.sources.FrameSource reads"),
        (ValueError, {"frames": frames, "time": [0.0, float("inf")]}, "time: expected finite seconds, got inf"),
        (ValueError, {"frames": frames, "time": [float("nan"), 1.0]}, "time: expected finite seconds, got nan"),
        (TypeError, {"frames": frames, "time": [moment, moment]}, r"time: expected seconds .* moment.timestamp\(\)"),
        (TypeError, {"frames": frames[:1], "time": moment}, r"time: expected seconds .* moment.timestamp\(\)"),
        (TypeError, {"frames": frames[:1], "time": "now"}, "time: expected seconds"),
    ):
        with pytest.raises(error, match=message):
            session.push(**arguments)
    session.push(frames)
    for question in ("", "  \n"):
        with pytest.raises(ValueError, match="text: expected a question, got an empty one"):
            session.ask(question)
    with pytest.raises(ValueError, match=r"input_ids: expected \[1, L\] with one 191 .* got \[1, 2\] with 0"):
        session.ask(input_ids=torch.tensor([[5, 6]]))
    for make in (vmemory.attach, VideoSession):
        with pytest.raises(
            ValueError, match=r"model: expected the model inside the wrapper, model\.module, got DataParallel"
        ):
            make(torch.nn.DataParallel(model))


def test_an_early_span_goes_and_the_rest_stays(words):
    model, _ = tiny(PAIRED)
    session = VideoSession(model, words, config={"memory_policy": "merging", "memory_capacities": 4})
    session.push(film(16), [float(t) for t in range(16)])
    before = session.memory.entries()
    hit = (before.start <= 3) & (before.stop >= 2)
    assert session.erase(2.0, 3.0) == int(hit.sum()) < len(hit)
    after = session.memory.entries()
    assert torch.equal(after.frame, before.frame[~hit])
    assert isinstance(session.ask("what happens?", **GREEDY), str)
    everything = VideoSession(model, words, config={"memory_policy": "merging", "memory_capacities": 4})
    everything.push(film(16), [float(t) for t in range(16)])
    assert everything.erase(2.0, 3.0, drop_dependent=True) == 4
