"""Frames as people have them, questions in words: prompts as the installed processors write them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.tiny_vlms import FAMILIES, tiny
from tests.tiny_words import byte_words
from vmemory._attach import adapter_of
from vmemory.models.pixels import CLIP_MEAN, CLIP_STD, patch_rows, scaled, size_for
from vmemory.session import VideoSession
from vmemory.sources import Frame, FrameSource

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def words():
    return byte_words()


def film(frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    first = 200 * torch.rand(1, 3, height, width, generator=draw)
    drift = 5 * torch.rand(frames, 3, height, width, generator=draw).cumsum(0)
    return (first + drift).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_in_words(words, family):
    model, _ = tiny(family)
    session = VideoSession(model, words, config={"memory_capacities": [3, 2, 1]})
    for first in range(0, 16, 3):
        session.push(film(16)[first : first + 3])
    answer = session.ask("what happens?", **GREEDY)
    assert isinstance(answer, str)
    placeholders = session.prompt("what happens?")["input_ids"] == adapter_of(model).placeholder_id(model)
    assert session.num_tokens == int(placeholders.sum())
    assert "".join(session.stream_generate("what happens?", **GREEDY)) == answer


def test_frames_in_every_form_are_the_same_frames(words):
    from PIL import Image

    frames = film(8)
    arrays = frames.permute(0, 2, 3, 1).numpy()
    forms = {
        "tensor": [frames], "array": [arrays], "pictures": [[Image.fromarray(a) for a in arrays]],
        "one by one": list(arrays), "frames": [[Frame(a, float(i), i) for i, a in enumerate(arrays)]],
        "source": [FrameSource(arrays, source_fps=1.0)],
    }  # fmt: skip
    prompts = {}
    for name, pushes in forms.items():
        model, _ = tiny("qwen3_vl")
        session = VideoSession(model, words, config={"memory_capacities": [2, 2]})
        for push in pushes:
            session.push(push)
        prompts[name] = (session.prompt("?"), session.held.tokens)
    ids, tokens = prompts["tensor"][0]["input_ids"], prompts["tensor"][1]
    for other, held in prompts.values():
        assert torch.equal(other["input_ids"], ids)
        torch.testing.assert_close(held, tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "processor"),
    [("qwen3_vl", transformers.Qwen3VLProcessor), ("video_llama_3", transformers.VideoLlama3Processor)],
)
def test_times_are_written_as_the_installed_processor_writes_them(family, processor):
    model, _ = tiny(family)
    adapter, fps, n = adapter_of(model), 2.0, 16
    together = adapter.temporal_patch_size(model)
    metadata = SimpleNamespace(fps=fps, frames_indices=list(range(n)), timestamps=[i / fps for i in range(n)])
    own = SimpleNamespace(
        video_token="<|video_pad|>", vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=together), tokenizer=None,
    )  # fmt: skip
    if hasattr(processor, "_calculate_timestamps"):
        own._calculate_timestamps = lambda *a: processor._calculate_timestamps(own, *a)
    grids = torch.tensor([[n // together, 4, 4]])
    inputs = {
        "video_grid_thw": grids, "video_merge_sizes": torch.tensor([2]), "video_metadata": [metadata],
        "video_compression_mask": torch.ones(n // together * 4, dtype=torch.bool),
    }  # fmt: skip
    theirs = processor.replace_video_token(own, inputs, 0)
    times = [i / fps for i in range(n)]
    frames = [(adapter.frame_time(times[i], times[i + together - 1]), 4) for i in range(0, n, together)]
    assert adapter.video_text(frames, "<|video_pad|>", 0) == theirs


def test_pixels_are_those_of_the_installed_processor():
    frame = film(1, 56, 84)
    processor = transformers.Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=10**6)
    theirs = processor([frame[0].permute(1, 2, 0).numpy()], return_tensors="pt")
    rows, grid = patch_rows(scaled(frame.repeat(2, 1, 1, 1), (56, 84), CLIP_MEAN, CLIP_STD), 14, 2, 2)
    assert [grid] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(rows, torch.as_tensor(np.asarray(theirs["pixel_values"])), rtol=0, atol=1e-5)


def test_a_frame_keeps_its_size_however_long_the_stream():
    assert size_for((360, 640), 28, 256) == (12 * 28, 21 * 28)
    assert size_for((56, 84), 28, 256) == (56, 84)
    assert size_for((4, 4), 28, 256) == (28, 28)
    model, _ = tiny("qwen2_5_vl")
    session = VideoSession(model, config={"memory_capacities": [2, 1]}, frame_tokens=6)
    for _ in range(4):
        session.push(film(32, 64, 96))
        assert session._grid == (2, 3)


def test_a_callback_comes_when_the_push_is_complete(tmp_path):
    model, _ = tiny("qwen2_5_vl")
    settings = {"memory_capacities": [4, 2]}

    def note(session):
        session.save(tmp_path / "now.vmem")
        if session.memory.counts()["seen"] == 4:
            raise RuntimeError("the callback's own affair")

    noted = VideoSession(model, config=settings, on_push=[note])
    plain = VideoSession(model, config=settings)
    frames = film(9)
    noted.push(frames[:5])
    with pytest.raises(RuntimeError, match="own affair"):
        noted.push(frames[5:8])
    plain.push(frames[:8])
    again = VideoSession.load(tmp_path / "now.vmem", model)
    for session in (noted, plain, again):
        session.push(frames[8])
    for session in (noted, again):
        assert torch.equal(session.held.tokens, plain.held.tokens)
        assert torch.equal(session.held.time, plain.held.time)


def test_ready_inputs_do_not_overtake_a_waiting_frame():
    model, inputs = tiny("qwen2_5_vl")
    session = VideoSession(model, config={"memory_capacities": [8]}, fps=2.0)
    ready = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    session.push(film(1)[0])
    with pytest.raises(ValueError, match="inputs: expected no frame that waits"):
        session.push(**ready)
    session.push(film(2)[1], time=0.5)
    session.push(time=torch.arange(8) + 10.0, **ready)
    with pytest.raises(ValueError, match=r"time: expected strictly increasing seconds above 17\.0"):
        session.push(film(2), time=[9.0, 9.5])
    session.push(film(2), time=[20.0, 20.5])
    assert session.memory.counts()["seen"] == 10


@pytest.mark.parametrize(
    ("error", "frames", "message"),
    [
        (ValueError, [], "frames: expected at least one, got none"),
        (ValueError, torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "frames: expected at least one, of at least one"),
        (ValueError, torch.zeros(2, 3, 32, 32), r"frames: expected uint8 RGB .* got torch.float32"),
        (ValueError, torch.zeros(2, 4, 32, 32, dtype=torch.uint8), r"got torch.uint8 of shape \[2, 4, 32, 32\]"),
        (ValueError, [film(1)[0], film(1, 32, 48)[0]], r"frames: expected one size, got \(32, 32\) and \(32, 48\)"),
        (TypeError, b"film", "frames: expected a tensor, an array, pictures or Frames, got bytes"),
        (TypeError, iter([film(1)]), "frames: expected an iterable of Frame, got one of Tensor"),
    ],
)
def test_what_is_no_frame_is_refused_before_anything_changes(error, frames, message):
    model, _ = tiny("qwen2_5_vl")
    session = VideoSession(model, config={"memory_capacities": [4, 2]})
    with pytest.raises(error, match=message):
        session.push(frames)
    assert session.memory is None
    assert not session._waiting
    session.push(film(2))


def test_a_camera_may_change_its_size_between_two_frames_of_a_pair():
    model, _ = tiny("qwen2_5_vl")
    session = VideoSession(model, config={"memory_capacities": [4, 2]})
    session.push(film(3))
    session.push(film(1, 48, 64)[0], time=3.0)
    session.push(film(2, 48, 64), time=[4.0, 5.0])
    assert session.memory.counts()["seen"] == 3
    assert session.frame_size == (32, 32)
