"""Items of published benchmarks, made here in their form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmemory.data.online import BENCHMARKS, read_benchmark

ITEMS = {
    "ovbench": {
        "video": "a.mp4", "start": 3, "end": 30, "middle_frame_timestamp": 12.5, "question": "What?", "answer": "cup",
        "candidates": ["plate", "cup"], "answer_type": "now", "sub_answer_type": "object",
    },
    "ovo-bench": {
        "id": 0, "task": "EPM", "video": "a.mp4", "realtime": 12.5, "question": "What?", "answer": "cup",
        "options": ["plate", "cup"], "gt": 1,
    },
    "streamingbench": {
        "time": "[0:00:00 - 0:01:00]", "video_path": "a.mp4",
        "questions": [
            {
                "task_type": "object", "question": "What?", "time_stamp": "00:00:12.5", "answer": "B",
                "options": ["A. plate", "B.cup"],
            }
        ],
    },
    "video-mme": {
        "videoID": "a.mp4", "question_id": "1-1", "task_type": "object", "question": "What?",
        "options": ["A. plate", "B. cup"], "answer": "B", "duration": "short",
    },
    "vsi-bench": {
        "id": 4, "dataset": "scannet", "scene_name": "s1", "question_type": "object", "question": "What?",
        "ground_truth": "B", "options": ["A. plate", "B. cup"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_items_are_read(name: str, tmp_path: Path) -> None:
    for suffix, text in ((".json", json.dumps([ITEMS[name]])), (".jsonl", json.dumps(ITEMS[name]) + "\n")):
        (tmp_path / f"x{suffix}").write_text(text)
        [question], skipped = read_benchmark(tmp_path / f"x{suffix}", name)
        assert skipped == []
        assert (question.text, question.options, question.answer) == ("What?", ("plate", "cup"), "B")
        assert question.time == (None if name in ("video-mme", "vsi-bench") else 12.5)
        assert question.prompt() == "What?\nA. plate\nB. cup\nAnswer with the letter of the right option."


def test_forward_tasks_of_ovo_bench_are_asked_at_each_of_their_times() -> None:
    times = [
        {"realtime": 5, "count": 0, "type": 0, "step": "cut"},
        {"realtime": 9, "count": 2, "type": 1, "step": "cut"},
    ]
    for task, answers in (("REC", ["0", "2"]), ("SSR", ["No", "Yes"]), ("CRR", ["No", "Yes"])):
        item = {"task": task, "video": "a", "activity": "jump", "question": "Who?", "test_info": times}
        questions, _ = read_benchmark([item], "ovo-bench")
        assert [(q.time, q.answer, q.options) for q in questions] == [(5.0, answers[0], ()), (9.0, answers[1], ())]


def test_numbers_are_answers_too() -> None:
    item = {**ITEMS["vsi-bench"], "options": None, "ground_truth": 3.2}
    [question], _ = read_benchmark([item], "vsi-bench")
    assert (question.answer, question.prompt()) == ("3.2", "What?")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_fields_are_named(name: str) -> None:
    item = json.loads(json.dumps(ITEMS[name]))
    inner = item["questions"][0] if name == "streamingbench" else item
    inner["question"] = None
    questions, skipped = read_benchmark([item, ITEMS[name], "no item"], name)
    assert len(questions) == 1
    assert [left.reason for left in skipped] == ["question: expected it, got none", "item: expected an object, got str"]


def test_what_cannot_be_an_answer_is_told() -> None:
    for change, reason in (
        ({"answer": "E"}, "answer: expected one of 2 options, got 'E'"),
        ({"options": ["one"]}, r"options: expected two or more, got ['one']"),
    ):
        _, [left] = read_benchmark([{**ITEMS["video-mme"], **change}], "video-mme")
        assert left.reason == reason
    _, [left] = read_benchmark([{**ITEMS["ovbench"], "middle_frame_timestamp": "soon"}], "ovbench")
    assert left.reason == "middle_frame_timestamp: expected seconds or hours:minutes:seconds, got 'soon'"


def test_unknown_benchmarks_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"benchmark: expected one of ovbench, .*, got 'imagenet'"):
        read_benchmark([], "imagenet")
    (tmp_path / "x.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match=r"x\.jsonl: line 2: not JSON"):
        read_benchmark(tmp_path / "x.jsonl", "ovbench")
