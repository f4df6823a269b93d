"""A session over a stream gives what the model with a memory gives for the whole video."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.attach_oracle import GREEDY
from tests.tiny_vlms import CLOSE, FAMILIES, IMAGE, OPEN, SEPARATOR, SIDE, VIDEO, VISION_END, VISION_START, stamp, tiny
from vmemory import attach, compress_inputs
from vmemory.banks import POLICIES
from vmemory.session import VideoSession

SETTINGS = {"memory_capacities": [4, 3, 2]}
T = 24
# where two frames of the video are one of the memory, a second each
TWO_A_SECOND = 2.0

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def whole_video(family):
    """A model and its inputs, without VideoLLaMA3's pruning, which a stream leaves to the memory."""
    model, inputs = tiny(family, T=T)
    if inputs.pop("video_compression_mask", None) is not None:
        frames = [
            part
            for f in range(T)
            for part in (torch.full((int(f > 0),), SEPARATOR), stamp(f), torch.full((SIDE**2,), VIDEO))
        ]
        ids = torch.cat([torch.tensor([20, 21, 22, 23]), *frames, torch.tensor([30, 31])])[None]
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs


def chunks(inputs, n):
    """The inputs of the tower, n frames at a time."""
    for first in range(0, T, n):
        if "pixel_values" in inputs:
            yield {"pixel_values": inputs["pixel_values"][first : first + n]}
            continue
        pixels = inputs["pixel_values_videos"]
        if pixels.dim() == 5:
            yield {"pixel_values_videos": pixels[:, first : first + n].contiguous()}
            continue
        t, h, w = inputs["video_grid_thw"][0].tolist()
        grid = {"video_grid_thw": torch.tensor([[min(n, t - first), h, w]])}
        sizes = {k: v for k, v in inputs.items() if k == "video_merge_sizes"}
        yield {"pixel_values_videos": pixels[first * h * w : (first + n) * h * w], **grid, **sizes}


def question(family, inputs):
    """The prompt with one placeholder where the video stood, and what writes the video back."""
    ids, visual = inputs["input_ids"][0], IMAGE if family in ("llava", "vipllava") else VIDEO
    places = (ids == visual).nonzero().flatten()
    first, stop = int(places[0]), int(places[-1]) + 1
    marked = family.startswith("qwen3") and "omni" not in family
    stamped = marked or family in ("video_llama_3", "llava", "vipllava")
    if stamped:
        first -= 3 + marked
        stop += marked

    def video_ids(held):
        parts = []
        for k, entry in enumerate(held):
            before = [SEPARATOR] if family == "video_llama_3" and k else []
            time = [OPEN, 100 + entry.frame % 50, CLOSE]
            run = torch.full((len(entry.cells),), visual)
            start, end = ([VISION_START], [VISION_END]) if marked else ([], [])
            parts += [torch.tensor([*before, *time, *start]), run, torch.tensor(end, dtype=torch.long)]
        return torch.cat(parts)

    asked = torch.cat([ids[:first], torch.tensor([visual]), ids[stop:]])[None]
    return asked, video_ids if stamped else None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_equals_the_whole_video_at_once(family):
    model, inputs = whole_video(family)
    with attach(model, config=SETTINGS), torch.no_grad():
        wanted = model.generate(**inputs, **GREEDY)
    offline = compress_inputs(model, inputs, config=SETTINGS)
    asked, video_ids = question(family, inputs)
    for n in (1, 5, T):
        for reuse in (False, True):
            session = VideoSession(model, config=SETTINGS, reuse_prefix=reuse, fps=TWO_A_SECOND)
            for piece in chunks(inputs, n):
                session.push(**piece)
            prompt = session.prompt(input_ids=asked, video_ids=video_ids)
            assert torch.equal(prompt["input_ids"], offline["input_ids"])
            if "position_ids" in offline:
                assert torch.equal(prompt["position_ids"], offline["position_ids"])
            calls = session.tower.calls
            for _ in range(2):
                out = session.ask(input_ids=asked, video_ids=video_ids, **GREEDY)
                assert torch.equal(out.sequences[:, -5:], wanted.sequences[:, -5:])
                for a, b in zip(out.logits, wanted.logits, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert session.tower.calls == calls


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_watches_in_constant_bytes(policy):
    model, inputs = tiny("qwen2_5_vl", T=T)
    capacities = {"hierarchical": [4, 3, 2], "dual": [2, 4]}.get(policy, 6)
    session = VideoSession(model, config={"memory_policy": policy, "memory_capacities": capacities})
    tokens, nbytes = [], []
    for piece in chunks(inputs, 2):
        session.push(**piece)
        tokens.append(session.num_tokens)
        nbytes.append(session.nbytes)
    assert len(set(tokens[-3:])) == 1
    assert len(set(nbytes)) == 1
    asked, _ = question("qwen2_5_vl", inputs)
    assert session.ask(input_ids=asked, **GREEDY).sequences.shape[1] == session.num_tokens + asked.shape[1] - 1 + 5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_a_saved_session_goes_on(tmp_path, family):
    model, inputs = whole_video(family)
    asked, video_ids = question(family, inputs)
    pieces = list(chunks(inputs, 6))
    session = VideoSession(model, config=SETTINGS)
    for piece in pieces[:2]:
        session.push(**piece)
    session.save(tmp_path / "half.vmem")
    other = VideoSession.load(tmp_path / "half.vmem", model)
    for piece in pieces[2:]:
        session.push(**piece)
        other.push(**piece)
    one, two = (s.ask(input_ids=asked, video_ids=video_ids, **GREEDY) for s in (session, other))
    assert torch.equal(one.sequences, two.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, two.logits, strict=True))


def test_the_gate_decides_and_callbacks_follow():
    model, inputs = tiny("qwen2_5_vl", T=T)
    seen = []
    session = VideoSession(
        model, config=SETTINGS, gate=lambda frames, s: torch.arange(len(frames)) % 2 == 0,
        on_push=[lambda s: seen.append(s.num_tokens)],
    )  # fmt: skip
    for piece in chunks(inputs, 4):
        session.push(**piece)
    assert session.memory.counts()["seen"] == T // 2
    assert len(seen) == T // 4


def test_retrieval_leaves_out_what_is_below_the_threshold():
    model, inputs = tiny("qwen2_5_vl", T=T)
    settings = {"memory_policy": "recent", "memory_capacities": 6}
    session = VideoSession(model, config=settings)
    with pytest.raises(ValueError, match="session: expected frames before"):
        session.search(torch.zeros(1, 32))
    strict = VideoSession(model, config={**settings, "memory_similarity_threshold": 0.999})
    for piece in chunks(inputs, 4):
        session.push(**piece)
        strict.push(**piece)
    query = session.memory.entries().descriptor[-1:]
    assert bool((session.search(query, 3).frame >= 0).all())
    assert session.search(query, 3).frame[0, 0] == T - 1
    found = strict.search(query, 3)
    assert found.frame[0, 0] == T - 1
    assert torch.equal(found.frame >= 0, found.values >= 0.999)


def test_a_gate_that_lets_nothing_through_leaves_nothing_to_ask():
    model, inputs = tiny("qwen2_5_vl", T=T)
    session = VideoSession(model, config=SETTINGS, gate=lambda *_: False)
    session.push(**next(chunks(inputs, 4)))
    with pytest.raises(ValueError, match="none that the gate let through"):
        session.ask(input_ids=torch.tensor([[VIDEO]]))


def test_positions_from_the_oldest_entry_stay_small():
    model, inputs = tiny("qwen2_5_vl", T=T)
    tops = {}
    for origin in ("start", "oldest"):
        settings = {"memory_policy": "recent", "memory_capacities": 3}
        session = VideoSession(model, config=settings, time_origin=origin)
        for piece in chunks(inputs, 4):
            session.push(**piece)
        prompt = session.prompt(input_ids=question("qwen2_5_vl", inputs)[0])
        first = int((prompt["input_ids"][0] == VIDEO).nonzero()[0])
        tops[origin] = int(prompt["position_ids"][1, 0, first])
    # 21 frames have left, two seconds each and two positions a second
    assert tops["start"] - tops["oldest"] == 21 * 2 * 2


def test_bad_input_changes_nothing():
    model, _ = tiny("qwen2_5_vl", T=T)
    session = VideoSession(model, config=SETTINGS)
    with pytest.raises(ValueError, match="session: expected frames before a question"):
        session.ask(input_ids=torch.tensor([[VIDEO]]))
    frames = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    session.push(frames, time=[0, 1, 2, 3])
    before = session.memory.snapshot()
    for bad, message in (
        ({"frames": frames, "time": [3, 4, 5, 6]}, "time: expected strictly increasing seconds above 3"),
        ({"frames": frames, "time": [9, 8, 10, 11]}, "time: expected strictly increasing"),
        ({"frames": frames, "time": [9.0]}, "time: expected 4 seconds"),
        ({"frames": frames.float()}, "frames: expected uint8"),
        ({}, "frames: expected frames or ready inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            session.push(**bad)
    assert all(torch.equal(a, b) for a, b in zip(before, session.memory.snapshot(), strict=True))
    with pytest.raises(ValueError, match="processor: expected one"):
        session.ask("what happens?")
