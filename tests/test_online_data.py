"""Annotated items as a model's inputs: what is read, which frames belong where, what is learned, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clips import write_clip_at
from tests.tiny_vlms import FAMILIES
from tests.tiny_words import byte_words
from vmemory.data.online import (
    Collator,
    ItemError,
    OnlineVideoDataset,
    PromptWriter,
    Skipped,
    create_dataset,
    frame_indices,
    read_annotations,
)
from vmemory.data.online.conversation import parts_of, shifted, tagged_text, tracking_turns
from vmemory.data.online.item import Box, Item, Turn, read_item
from vmemory.data.online.prompt import IGNORED, Message
from vmemory.data.online.sampling import sample_video
from vmemory.data.world import World, make_items

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def online(times: list[float], **more: object) -> dict:
    turns = []
    for i, time in enumerate(times):
        turns.append({"from": "human", "timestamps": time, "value": f"<video>\nq{i}"})
        turns.append({"from": "gpt", "value": f"a{i}"})
    return {"video": "clip", "conversations": turns, **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip of five seconds at two frames a second, a picture sequence and a damaged file."""
    from PIL import Image

    root = tmp_path_factory.mktemp("online")
    from fractions import Fraction

    write_clip_at(root / "clip.mp4", list(range(10)), base=Fraction(1, 2), rate=2)
    (root / "v1.0").mkdir()
    (root / "v1.0" / "take.2.mp4").write_bytes((root / "clip.mp4").read_bytes())
    (root / "broken.mp4").write_bytes(b"no video at all")
    (root / "seq").mkdir()
    for i in range(6):
        Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)).save(root / "seq" / f"{i:03}.png")
    return root


def sequence(**more: object) -> dict:
    return {
        "video": "seq",
        "all_image_files": [f"{i:03}.png" for i in range(6)],
        "image_bboxes": [{"timestamp": 2.0 + i, "bbox": [0.1 * i, 0.0, 0.5, 0.5]} for i in range(6)],
        "query_template": {"from": "human", "value": "Track <bbox>."},
        **more,
    }


# ---- reading


def test_annotations_in_every_container(root: Path, tmp_path: Path) -> None:
    item = online([1.0])
    (tmp_path / "a.json").write_text(json.dumps([item, item]))
    (tmp_path / "b.jsonl").write_text(json.dumps(item) + "\n\n{'no': 'json'}\n" + json.dumps(item) + "\n")
    sets = {
        "one": {"annotation": "a.json", "data_root": str(root), "repeat_time": 2},
        "two": {"annotation": "b.jsonl", "data_root": str(root), "repeat_time": 0.5},
    }
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    assert len(read_annotations(tmp_path / "a.json", root).items) == 2
    lines = read_annotations(tmp_path / "b.jsonl", root)
    assert (len(lines.items), lines.skipped[0].name) == (2, "b.jsonl, line 3")
    both = read_annotations(tmp_path / "meta.json")
    assert (len(both.items), len(both.skipped)) == (5, 1)
    assert len(read_annotations([item], root).items) == 1


def test_annotations_of_datasets(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # rows of such a set have all columns, with None where an item has no such field
    rows = [
        online([1.0, 2.0], clip=[0.0, 3.0]),
        online([3.0]),
        sequence(),
        {"video": None, **make_items(World(4, 12), "")[0]},
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    listed = datasets.Dataset.from_list([{**columns, **row} for row in rows])
    assert listed[1]["clip"] is None
    found = read_annotations(listed, root)
    assert (found.skipped, [item.kind for item in found.items]) == ([], ["online", "online", "tracking", "online"])
    assert [turn.time for turn in found.items[0].turns] == [1.0, 2.0]
    assert found.items[3].world == rows[3]["world"]
    assert found.items == [
        replace(item, name=other.name)
        for item, other in zip(read_annotations(rows, root).items, found.items, strict=True)
    ]
    dataset = create_dataset(listed, None, None, video_root=str(root))
    assert len(dataset) == 4


def test_short_clips_are_sampled_more_densely_on_demand(root: Path) -> None:
    assert frame_indices(10, 2.0) == [1, 3, 5, 7, 9]
    assert frame_indices(10, 2.0, least=8) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert frame_indices(3, 30.0, least=4) == [0, 1, 2]
    assert len(sample_video(root / "clip.mp4", least=7).pictures) == 7
    with pytest.raises(ValueError, match="min_num_frame: expected 1 to max_num_frame 4, got 5"):
        OnlineVideoDataset([online([1.0])], max_num_frame=4, min_num_frame=5)


def test_items_of_worlds_need_no_video() -> None:
    world = World(4, 12)
    [item, *_] = make_items(world, "")
    dataset = OnlineVideoDataset([item], max_num_frame=6)
    assert [found.kind for found in dataset.items] == ["online"]
    sampled, parts, _ = dataset.parts(dataset.items[0], np.random.RandomState(0))
    assert sampled.times == [0, 2, 4, 6, 8, 11]
    assert (sampled.pictures[3] == world.render(np.array([6]))[0]).all()
    assert parts[-1].stop == 6
    item = {**item, "world": {**item["world"], "version": 0}}
    dataset = OnlineVideoDataset([item])
    with pytest.raises(ItemError, match="world: expected version, split, seed, seconds and pace, got"):
        dataset.parts(dataset.items[0], np.random.RandomState(0))


def test_malformed_json_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"video": "x",\n "conversations": [}]')
    with pytest.raises(ValueError, match=r"a\.json: line 2: not JSON"):
        read_annotations(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"video": "x"}')
    with pytest.raises(ValueError, match=r"b\.json: expected a list of items, or sets .*, got an object with 'video'"):
        read_annotations(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": "gone.mp4"}, r"video: expected a file, got .*gone\.mp4, which does not exist"),
        ({"conversations": []}, "conversations: expected turns, got none"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}]},
            "expected a question before each answer, got 'gpt' in turn 1",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}]},
            "expected an answer to the question in turn 1, got none",
        ),
        ({"conversations": [{"from": "bird", "value": "q"}]}, "expected who speaks in turn 1, got 'bird'"),
        (online([3.0, 2.0]), "timestamps: expected them in order, got 2.0 after 3.0"),
        (online([float("nan")]), "time of turn 1: expected seconds, got nan"),
        ({"clip": [4, 2]}, "clip: expected an end behind its start"),
        (sequence(image_bboxes=[]), "image_bboxes: expected one for each of 6 pictures, got 0"),
        (sequence(query_template={"value": "where?"}), "query_template: expected a value with <bbox>"),
    ],
)
def test_broken_items_are_named_and_left_out(root: Path, change: dict, message: str) -> None:
    data = [{**online([1.0]), **change}, online([1.0])]
    dataset = OnlineVideoDataset(data, video_root=str(root))
    assert len(dataset) == 1
    [left] = dataset.skipped
    assert left.name.startswith("item, item 0")
    with pytest.raises(ItemError, match=message):
        read_item(data[0], root, "here")
    assert "1 items, 1 left out" in dataset.summary()


def test_names_without_an_ending_are_found_though_folders_have_dots(root: Path) -> None:
    item = read_item({**online([1.0]), "video": "v1.0/take.2"}, root, "here")
    assert item.video == root / "v1.0" / "take.2.mp4"


def test_items_are_never_changed(root: Path) -> None:
    data = [online([1.0, 3.0], need_reset_timestamp=True), sequence(need_reset_timestamp=True)]
    before = copy.deepcopy(data)
    dataset = OnlineVideoDataset(data, video_root=str(root))
    first = [dataset.parts(item, np.random.RandomState(0))[1] for item in dataset.items]
    again = [dataset.parts(item, np.random.RandomState(0))[1] for item in dataset.items]
    assert data == before
    assert first == again


def test_other_formats(root: Path) -> None:
    said = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
    llama = read_item({"video": ["clip.mp4"], "conversations": said}, root, "x")
    assert (llama.kind, llama.turns[0].time) == ("offline", None)
    picture = read_item({"image": "seq/000.png", "conversations": said}, root, "x")
    assert (picture.kind, len(picture.pictures)) == ("offline", 1)
    text = read_item({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, root, "x")
    assert text.kind == "text"
    asked = read_item({"video": "clip", "QA": [{"i": "Look.", "q": "What?", "a": "That."}]}, root, "x")
    assert asked.turns == (Turn(None, "<video>\nLook. What?", "That."),)
    stream = {
        "video": "clip", "stream": True, "start_time": 0, "end_time": 5,
        "conversation": [
            {"role": "user", "content": "Tell me", "time": 0}, {"role": "assistant", "content": "Now", "time": 2},
            {"role": "assistant", "content": "Again", "time": 4},
        ],
    }  # fmt: skip
    read = read_item(stream, root, "x")
    assert (read.kind, read.clip) == ("stream", (0.0, 5.0))
    assert read.turns == (Turn(2.0, "Tell me", "Now"), Turn(4.0, "", "Again"))


def test_statistics(root: Path) -> None:
    stats = OnlineVideoDataset(
        [online([1.0, 2.0]), online([1.0]), sequence()], video_root=str(root)
    ).get_format_statistics()
    assert stats["total_samples"] == 3
    assert stats["kinds"] == {"online": 2, "tracking": 1}
    assert (stats["timestamp_count"], stats["max_timestamps_per_sample"], stats["bbox_count"]) == (3, 2, 6)
    assert stats["avg_timestamps_per_sample"] == 1.0


# ---- frames; golden_cases/vco_dataset.py has what equals the original, these are the knowing differences


def test_difference_the_last_frame_reaches_the_model() -> None:
    times = [0.5, 1.5, 2.5]
    [part] = parts_of([Turn(3.0, "<video>\nq", "a")], times)
    assert (part.first, part.stop) == (0, 3)
    assert "Frame3 at 2.5s: <image>" in tagged_text(part, times)


def test_difference_short_clips_give_a_frame() -> None:
    assert frame_indices(10, 30.0) == [5]
    assert frame_indices(1, 25.0) == [0]


def test_difference_slow_videos_give_each_frame_once() -> None:
    assert frame_indices(6, 1.0) == [0, 1, 2, 3, 4, 5]
    assert frame_indices(4, 0.5, "fps2") == [0, 1, 2, 3]


def test_difference_questions_move_with_the_frames() -> None:
    item = Item("x", "online", reset=True)
    turns, times = shifted(item, [Turn(3.5, "q", "a")], [0.5, 1.5, 2.5, 3.5, 4.5])
    assert (turns[0].time, times) == (3.0, [0.0, 1.0, 2.0, 3.0, 4.0])
    # a frame at the very time of a question belongs to it, whatever floating point makes of the difference
    assert parts_of(turns, times)[0].stop == 4
    turns, times = shifted(item, [Turn(7.3, "q", "a")], [0.1 + 0.9 * i for i in range(9)])
    assert parts_of(turns, times)[0].stop == 9


def test_difference_questions_beyond_the_end_are_refused() -> None:
    with pytest.raises(ItemError, match=r"timestamps: expected them up to the video's end at 2.5 s, got 9.0"):
        parts_of([Turn(9.0, "q", "a")], [0.5, 1.5, 2.5])
    # a video ends up to a second behind its last frame
    assert parts_of([Turn(3.2, "q", "a")], [0.5, 1.5, 2.5])[0].stop == 3


def test_difference_times_are_written_with_a_tenth() -> None:
    turns = tracking_turns([Box(1, [0, 0, 1, 1]), Box(2, [0, 0, 1, 1])], "<bbox>?", 0)
    assert turns[0] == Turn(1, "[0, 0, 1, 1]?", "At 1.0s, [0, 0, 1, 1]")
    assert turns[1] == Turn(2, "<video>\n", "At 2.0s, [0, 0, 1, 1]")


def test_difference_tracking_times_move_with_the_frames(root: Path) -> None:
    dataset = OnlineVideoDataset([sequence(need_reset_timestamp=True)], video_root=str(root))
    _, parts, times = dataset.parts(dataset.items[0], np.random.RandomState(0))
    assert times == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert "\n".join(part.answer for part in parts).startswith("At 0.0s, [0.0, 0.0, 0.5, 0.5]\nAt 1.0s")
    assert parts[-1].stop == 6


def test_sampled_frames_are_the_chosen_ones(root: Path) -> None:
    sampled = sample_video(root / "clip.mp4", most=3)
    # of 0.5, 1.5 … 4.5 seconds every second one; a frame's brightness is four times its number
    assert sampled.times == [0.5, 2.5, 4.5]
    assert [round(float(picture.mean()) / 4) for picture in sampled.pictures] == [1, 5, 9]
    clipped = sample_video(root / "clip.mp4", clip=(2.0, 4.0))
    assert clipped.times == [2.5, 3.5]
    with pytest.raises(ItemError, match=r"clip: expected an end up to 5.0 s, got 9.0"):
        sample_video(root / "clip.mp4", clip=(2.0, 9.0))


# ---- prompts and labels

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% elif c.type == 'image' %}<image>{% else %}<|video_pad|>{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}<197>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words():
    tokenizer = byte_words()
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<197>"
    return tokenizer


def model_of(family: str):
    torch.manual_seed(0)
    return FAMILIES[family](2, 1, False, torch.Generator().manual_seed(0))[0]


def learned(tokenizer, inputs) -> str:
    return tokenizer.decode(inputs["labels"][inputs["labels"] != IGNORED])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_inputs_of_every_family_have_a_loss_on_the_answers_alone(family: str, root: Path) -> None:
    model, tokenizer = model_of(family), words()
    dataset = create_dataset([online([2.0, 4.0])], tokenizer, None, model=model, video_root=str(root), frame_tokens=4)
    inputs = dataset[0]
    assert learned(tokenizer, inputs).replace(" ", "") == "a0<197>a1<197>"
    out = model(**Collator(tokenizer)([inputs]))
    assert torch.isfinite(out.loss)
    # every frame's placeholders are there: the model would refuse another number
    places = int((inputs["input_ids"] == dataset.writer.placeholder).sum())
    assert places > 0


def test_prompts_are_those_of_a_session(root: Path) -> None:
    """What a model is trained to read is what a session asks it."""
    import vmemory

    model, tokenizer = model_of("video_llama_3").eval(), words()
    dataset = create_dataset(
        [online([3.0])], tokenizer, None, model=model, video_root=str(root), frame_tokens=4, turns="apart"
    )
    item = dataset[0]
    sampled = sample_video(root / "clip.mp4")
    session = vmemory.VideoSession(model, tokenizer, "recent", {"memory_capacities": (64,)}, frame_tokens=4)
    for picture, time in zip(sampled.pictures[:3], sampled.times[:3], strict=True):
        session.push(torch.from_numpy(picture)[None], time=[time])
    # a session's time begins with its first frame
    asked = tokenizer.decode(session.prompt("q0")["input_ids"][0])
    ours = tokenizer.decode(item["input_ids"][item["labels"] == IGNORED]).rstrip("\n")
    for i, time in enumerate(sampled.times[:3]):
        ours = ours.replace(f"{time:.1f}s", f"{i:.1f}s")
    assert ours == asked


def test_each_question_has_all_frames_before_it_when_they_are_apart(root: Path) -> None:
    model, tokenizer = model_of("video_llama_3"), words()
    dataset = create_dataset(
        [online([1.6, 4.6]), sequence()], tokenizer, None, model=model, video_root=str(root), frame_tokens=4,
        turns="apart",
    )  # fmt: skip
    frames = [int(dataset[i]["video_grid_thw"][:, 0].sum()) for i in range(2)]
    assert frames == [2, 5]
    assert [learned(tokenizer, dataset[i]) for i in range(2)] == ["a0<197>", "a1<197>"]
    assert len(dataset) == 3


def test_silence_is_learned_behind_frames_of_a_stream(root: Path) -> None:
    model, tokenizer = model_of("video_llama_3"), words()
    said = [{"role": "assistant", "content": "Now", "time": 2.6}, {"role": "assistant", "content": "End", "time": 4.6}]
    item = {"video": "clip", "stream": True, "conversation": said}
    dataset = create_dataset([item], tokenizer, None, model=model, video_root=str(root), frame_tokens=4)
    inputs = dataset[0]
    ids, labels = inputs["input_ids"], inputs["labels"]
    places = (ids == dataset.writer.placeholder).nonzero().flatten()
    each = len(places) // 5
    ends = [int(places[k]) + 1 for k in range(each - 1, len(places), each)]
    # five frames: something is said behind the third and the fifth, and two of the others count as silent
    told = [labels[end].item() for end in ends]
    assert told[2] == ids[ends[2]] != tokenizer.eos_token_id
    assert told[4] == ids[ends[4]]
    assert sorted(told[i] for i in (0, 1, 3)) == [IGNORED, tokenizer.eos_token_id, tokenizer.eos_token_id]
    again = dataset[0]["labels"]
    assert torch.equal(labels, again)


def test_text_without_a_video(root: Path) -> None:
    model, tokenizer = model_of("qwen2_5_vl"), words()
    talk = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    dataset = create_dataset(
        [{"conversations": talk}, online([2.0])], tokenizer, None, model=model, video_root=str(root)
    )
    batch = Collator(tokenizer)([dataset[0], dataset[1]])
    assert learned(tokenizer, dataset[0]) == "Ho<197>"
    # these bytes have none for a space
    assert "<system>Bekind." in tokenizer.decode(dataset[0]["input_ids"])
    assert torch.isfinite(model(**batch).loss)


def test_templates_that_take_back_are_refused(root: Path) -> None:
    tokenizer = words()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    writer = PromptWriter(model_of("video_llama_3"), tokenizer)
    with pytest.raises(ValueError, match="processor: expected a chat template that goes on from what it wrote"):
        writer.write([Message("q", "a")])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="processor: expected one with a chat template, got none"):
        PromptWriter(model_of("video_llama_3"), tokenizer)


# ---- datasets


def test_the_same_under_workers_and_after_a_restart(root: Path) -> None:
    model, tokenizer = model_of("video_llama_3"), words()
    data = [sequence(), online([2.0, 4.0])] * 2
    make = lambda: create_dataset(data, tokenizer, None, model=model, video_root=str(root), frame_tokens=4)  # noqa: E731
    one = make()
    loader = torch.utils.data.DataLoader(one, batch_size=2, collate_fn=Collator(tokenizer), num_workers=1)
    batches = list(loader)
    again = make()
    rest = [Collator(tokenizer)([again[2], again[3]])]
    for batch, expected in zip(batches[1:], rest, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    targets = set()
    for epoch in range(6):
        again.set_epoch(epoch)
        targets.add(len(again[0]["input_ids"]))
    assert len(targets) > 1
    copied = pickle.loads(pickle.dumps(one))
    assert torch.equal(copied[0]["input_ids"], one[0]["input_ids"])


def test_damaged_videos_are_named_and_left_out(root: Path) -> None:
    model, tokenizer = model_of("video_llama_3"), words()
    data = [{**online([1.0]), "video": "broken.mp4"}, online([1.0])]
    dataset = create_dataset(data, tokenizer, None, model=model, video_root=str(root), frame_tokens=4)
    left = dataset[0]
    assert isinstance(left, Skipped)
    assert left.name == "item, item 0 (broken.mp4)"
    with pytest.warns(UserWarning, match=r"left out: item, item 0 \(broken.mp4\): .*not a readable video"):
        batch = Collator(tokenizer)([left, dataset[1]])
    assert batch["input_ids"].shape[0] == 1
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="batch: expected an item that can be used, got item, item 0"),
    ):
        Collator(tokenizer)([left])
    assert [skipped.name for skipped in dataset.verify()] == [left.name]
    assert len(dataset) == 1
    assert dataset.verify() == []


def test_long_items_are_named_and_left_out(root: Path) -> None:
    model, tokenizer = model_of("video_llama_3"), words()
    dataset = create_dataset(
        [online([4.0])], tokenizer, None, model=model, video_root=str(root), frame_tokens=4, max_seq_length=10
    )
    assert dataset[0].reason.startswith("max_seq_length: expected up to 10 tokens, got ")
    # three tokens of words, and five frames of four
    assert dataset.lengths == [3 + 5 * 4]


def test_bad_arguments(root: Path) -> None:
    item = online([1.0])
    for arguments, message in (
        ({"sampling_method": "fast"}, "sampling_method: expected 'middle' or 'fps' and a number"),
        ({"turns": "both"}, "turns: expected one of together, apart, got 'both'"),
        ({"max_num_frame": 0}, "max_num_frame: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OnlineVideoDataset([item], video_root=str(root), **arguments)
    with pytest.raises(ValueError, match="model: expected one, for which inputs are written, got None"):
        OnlineVideoDataset([item], video_root=str(root))[0]
    with pytest.raises(ValueError, match="data_path: expected items that can be used, got 0 items, 1 left out"):
        create_dataset([item], None, None)
