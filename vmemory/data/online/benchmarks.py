"""Questions of published benchmarks, in one form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmemory.data.online.item import ItemError
from vmemory.data.online.reading import Skipped, read_json

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class BenchmarkQuestion(NamedTuple):
    """A question about a video at `time` seconds.

    Attributes:
        name: Of the question in its benchmark.
        video: As it is written there.
        time: Second up to which the video has been seen; None = all of it.
        start: Second at which the video begins to count.
        text: The question.
        options: Without letters; empty where the answer is free.
        answer: A letter, a number or words.
        kind: The benchmark's task.
    """

    name: str
    video: str
    time: float | None
    start: float
    text: str
    options: tuple[str, ...]
    answer: str
    kind: str

    def prompt(self) -> str:
        """Write the question, its options with letters, and how to answer."""
        if not self.options:
            return self.text
        lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, self.options, strict=False)]
        return "\n".join([self.text, *lines, "Answer with the letter of the right option."])


def _need(raw: Mapping[str, Any], *names: str) -> list[Any]:
    missing = [name for name in names if raw.get(name) is None]
    if missing:
        raise ItemError(f"{missing[0]}: expected it, got none")
    return [raw[name] for name in names]


def _time(name: str, value: Any) -> float:
    """Read seconds, also of `00:01:52`."""
    try:
        parts = [float(part) for part in str(value).split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or any(part < 0 for part in parts):
        raise ItemError(f"{name}: expected seconds or hours:minutes:seconds, got {value!r}")
    return sum(part * 60.0**place for place, part in enumerate(reversed(parts)))


def _options(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not 2 <= len(value) <= len(_LETTERS):
        raise ItemError(f"options: expected two or more, got {value!r}")
    out = []
    for letter, option in zip(_LETTERS, value, strict=False):
        text = str(option).strip()
        for mark in (f"{letter}.", f"({letter})", f"{letter}:"):
            text = text.removeprefix(mark)
        out.append(text.strip())
    return tuple(out)


def _letter(answer: Any, options: Sequence[str]) -> str:
    """Read a letter, the place of an option, or an option in words."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return _LETTERS[answer]
    text = str(answer).strip()
    letter = text.strip("().: ")[:1]
    if len(text.strip("().: ")) == 1 and letter in _LETTERS[: len(options)]:
        return letter
    if text in options:
        return _LETTERS[list(options).index(text)]
    raise ItemError(f"answer: expected one of {len(options)} options, got {answer!r}")


def _ovbench(raw: Mapping[str, Any], name: str) -> Iterable[BenchmarkQuestion]:
    video = raw.get("video") or raw.get("video_id")
    if not isinstance(video, str):
        raise ItemError("video: expected a name, got none")
    clip = raw.get("clip") or [raw.get("start") or 0.0, raw.get("end")]
    for i, entry in enumerate(raw.get("questions") or [raw]):
        time, text, answer = _need(entry, "middle_frame_timestamp", "question", "answer")
        options = _options(entry.get("options") or entry.get("candidates"))
        kind = str(entry.get("sub_answer_type") or entry.get("answer_type") or "")
        start = _time("start", clip[0])
        yield BenchmarkQuestion(
            f"{name}, question {i + 1}" if "questions" in raw else name, video, _time("middle_frame_timestamp", time),
            start, text, options, _letter(answer, options), kind,
        )  # fmt: skip


def _ovo(raw: Mapping[str, Any], name: str) -> Iterable[BenchmarkQuestion]:
    task, video = _need(raw, "task", "video")
    if "test_info" not in raw:
        time, text, gt = _need(raw, "realtime", "question", "gt")
        options = _options(raw.get("options"))
        yield BenchmarkQuestion(name, video, _time("realtime", time), 0.0, text, options, _letter(gt, options), task)
        return
    for i, entry in enumerate(raw["test_info"]):
        [time] = _need(entry, "realtime")
        if task == "REC":
            text, answer = f"How many times did they {_need(raw, 'activity')[0]}?", str(_need(entry, "count")[0])
        elif task == "SSR":
            text = f"Is this step being performed now: {_need(entry, 'step')[0]}?"
            answer = "Yes" if _need(entry, "type")[0] else "No"
        else:
            text = f"Has enough been seen to answer: {_need(raw, 'question')[0]}"
            answer = "Yes" if _need(entry, "type")[0] else "No"
        yield BenchmarkQuestion(f"{name}, time {i + 1}", video, _time("realtime", time), 0.0, text, (), answer, task)


def _streaming(raw: Mapping[str, Any], name: str) -> Iterable[BenchmarkQuestion]:
    video, questions = _need(raw, "video_path", "questions")
    for i, entry in enumerate(questions):
        time, text = _need(entry, "time_stamp", "question")
        options = _options(entry["options"]) if entry.get("options") else ()
        answer = entry.get("answer") if options else entry.get("answer", entry.get("ground_truth_output"))
        if answer is None:
            raise ItemError("answer: expected it, got none")
        yield BenchmarkQuestion(
            f"{name}, question {i + 1}", video, _time("time_stamp", time), 0.0, text, options,
            _letter(answer, options) if options else str(answer), str(entry.get("task_type") or ""),
        )  # fmt: skip


def _video_mme(raw: Mapping[str, Any], name: str) -> Iterable[BenchmarkQuestion]:
    text, answer = _need(raw, "question", "answer")
    video = raw.get("videoID") or raw.get("video_id")
    if not video:
        raise ItemError("videoID: expected it, got none")
    options = _options(raw.get("options"))
    kind = str(raw.get("task_type") or "")
    yield BenchmarkQuestion(
        str(raw.get("question_id") or name), str(video), None, 0.0, text, options, _letter(answer, options), kind
    )


def _vsi(raw: Mapping[str, Any], name: str) -> Iterable[BenchmarkQuestion]:
    scene, text, answer = _need(raw, "scene_name", "question", "ground_truth")
    options = _options(raw["options"]) if raw.get("options") else ()
    video = f"{raw['dataset']}/{scene}" if raw.get("dataset") else str(scene)
    yield BenchmarkQuestion(
        str(raw.get("id", name)), video, None, 0.0, text, options,
        _letter(answer, options) if options else str(answer), str(raw.get("question_type") or ""),
    )  # fmt: skip


# how the items of each benchmark are read
BENCHMARKS: dict[str, Callable[[Mapping[str, Any], str], Iterable[BenchmarkQuestion]]] = {
    "ovbench": _ovbench,
    "ovo-bench": _ovo,
    "streamingbench": _streaming,
    "video-mme": _video_mme,
    "vsi-bench": _vsi,
}


def read_benchmark(
    data: str | Path | Sequence[Mapping[str, Any]], benchmark: str
) -> tuple[list[BenchmarkQuestion], list[Skipped]]:
    """Read a benchmark's questions, and tell of those that cannot be used.

    Args:
        data: Path of its JSON or JSON-lines file, or its items, such as a 🤗 `datasets.Dataset`.
        benchmark: One of `BENCHMARKS`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown benchmark, or not JSON.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark: expected one of {', '.join(BENCHMARKS)}, got {benchmark!r}")
    items: Sequence[Any] = data if not isinstance(data, str | Path) else _loaded(Path(data))
    questions: list[BenchmarkQuestion] = []
    skipped: list[Skipped] = []
    for i in range(len(items)):
        name = f"{benchmark} item {i}"
        try:
            if not isinstance(items[i], Mapping):
                raise ItemError(f"item: expected an object, got {type(items[i]).__name__}")
            questions += BENCHMARKS[benchmark](items[i], name)
        except ItemError as error:
            skipped.append(Skipped(name, str(error)))
    return questions, skipped


def _loaded(path: Path) -> list[Any]:
    loaded = read_lines(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(loaded, list):
        raise ValueError(f"{path}: expected a list of items, got {type(loaded).__name__}")
    return loaded


def read_lines(path: Path) -> list[Any]:
    """Read a JSON value a line; empty lines count, but hold none."""
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            out += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number}: not JSON ({error.msg})") from None
    return out
