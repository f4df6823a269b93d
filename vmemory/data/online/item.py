"""One annotated video, in the same form whatever format it was written in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["online", "tracking", "offline", "stream", "text"]
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system", "stream": "stream"}


class ItemError(ValueError):
    """An item that cannot be used; the message is one line."""


class Turn(NamedTuple):
    """A question, with tags such as `<video>` as they were written, and its answer. `time` in seconds, None without."""

    time: float | None
    text: str
    answer: str


class Box(NamedTuple):
    """A box `[x1, y1, x2, y2]` as it was written, at `time` seconds."""

    time: float
    box: Sequence[float]


@dataclass(frozen=True)
class Item:
    """A video and a conversation about it.

    Attributes:
        name: Of the item, for people: where it stands and which video it is about.
        kind: `"online"` conversations have times, `"tracking"` ones are made from boxes, `"offline"` ones are about the
            whole video, `"stream"` ones say when to speak, `"text"` ones have no video.
        video: File or folder; None with pictures, or without either.
        pictures: Files, in order.
        world: A world of `vmemory.data.world` that is drawn, where the item names no video.
        turns: The conversation, empty for tracking.
        system: Text of a system message.
        boxes: One for each picture, for tracking; their times are the pictures'.
        template: The question of tracking, with `<bbox>` where a box belongs.
        clip: Seconds `(start, end)` of the video that count.
        reset: Whether times are shifted so that the first frame has second 0.
        length: Tokens, where the item tells.
    """

    name: str
    kind: Kind
    video: Path | None = None
    pictures: tuple[Path, ...] = ()
    world: Mapping[str, Any] | None = None
    turns: tuple[Turn, ...] = ()
    system: str | None = None
    boxes: tuple[Box, ...] = ()
    template: str | None = None
    clip: tuple[float, float] | None = None
    reset: bool = False
    length: int | None = None


def read_item(raw: Any, root: Path, where: str) -> Item:
    """Check an item and bring it into one form; nothing of `raw` is changed.

    Args:
        raw: A mapping in VideoChat-Online's, VideoLLaMA3's or LLaVA's format.
        root: Folder that paths are relative to.
        where: File and number, for messages.

    Raises:
        ItemError: A field is missing, has another form or contradicts another, or a file does not exist.
    """
    if not isinstance(raw, Mapping):
        raise ItemError(f"{where}: expected an object, got {type(raw).__name__}")
    media = raw.get("video") or raw.get("image")
    name = f"{where} ({media})" if isinstance(media, str) else where
    try:
        return _read(raw, root, name)
    except ItemError as error:
        raise ItemError(f"{name}: {error}") from None


def _read(raw: Mapping[str, Any], root: Path, name: str) -> Item:
    streaming = bool(raw.get("stream")) or any(
        isinstance(turn, Mapping) and turn.get("role") == "stream" for turn in raw.get("conversation") or ()
    )
    common: dict[str, Any] = {"name": name, "length": _length(raw), "reset": bool(raw.get("need_reset_timestamp"))}
    common["clip"] = _clip(raw, streaming)
    if raw.get("query_template"):
        pictures, boxes = _sequence(raw, root)
        return Item(**common, kind="tracking", pictures=pictures, boxes=boxes, template=_template(raw))
    system, turns = _turns(raw, streaming)
    if raw.get("all_image_files"):
        pictures, boxes = _sequence(raw, root)
        _check_order(turns, needed=True)
        return Item(**common, kind="online", pictures=pictures, boxes=boxes, turns=turns, system=system)
    images = raw.get("image")
    if images:
        files = [images] if isinstance(images, str) else images
        pictures = tuple(_file(root, file, "image") for file in _strings("image", files))
        return Item(**common, kind="offline", pictures=pictures, turns=turns, system=system)
    if not raw.get("video") and isinstance(raw.get("world"), Mapping):
        _check_order(turns, needed=True)
        return Item(**common, kind="online", world=dict(raw["world"]), turns=turns, system=system)
    if not raw.get("video"):
        if any("<video>" in turn.text or "<image>" in turn.text for turn in turns):
            raise ItemError("video: expected one for the <video> or <image> in its text, got none")
        return Item(**common, kind="text", turns=turns, system=system)
    video = _file(root, _one(raw["video"]), "video")
    timed = turns[0].time is not None
    _check_order(turns, needed=streaming or timed)
    kind: Kind = "stream" if streaming else "online" if timed else "offline"
    return Item(**common, kind=kind, video=video, turns=turns, system=system)


def _length(raw: Mapping[str, Any]) -> int | None:
    length = raw.get("length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ItemError(f"length: expected a number of tokens, got {length!r}")
    return length


def _clip(raw: Mapping[str, Any], streaming: bool) -> tuple[float, float] | None:
    given = raw.get("clip")
    if given is None and streaming and raw.get("end_time") is not None:
        given = [raw.get("start_time") or 0.0, raw["end_time"]]
    if given is None:
        return None
    if not (isinstance(given, Sequence) and len(given) == 2 and not isinstance(given, str)):
        raise ItemError(f"clip: expected [start, end] in seconds, got {given!r}")
    start, end = (_seconds("clip", value) for value in given)
    if end <= start:
        raise ItemError(f"clip: expected an end behind its start, got {given!r}")
    return start, end


def _seconds(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ItemError(f"{name}: expected seconds, got {value!r}")
    return float(value)


def _turns(raw: Mapping[str, Any], streaming: bool) -> tuple[str | None, tuple[Turn, ...]]:
    written = raw.get("conversations") or raw.get("conversation") or _questions(raw)
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        raise ItemError("conversations: expected turns, got none")
    said = [_message(turn, i) for i, turn in enumerate(written)]
    system = None
    if said[0][0] == "system":
        system, said = said[0][2], said[1:]
    if streaming:
        return system, _spoken(said)
    turns = []
    for i in range(0, len(said), 2):
        role, time, text = said[i]
        if role != "human":
            raise ItemError(f"conversations: expected a question before each answer, got {role!r} in turn {i + 1}")
        if i + 1 == len(said) or said[i + 1][0] != "gpt":
            raise ItemError(f"conversations: expected an answer to the question in turn {i + 1}, got none")
        turns.append(Turn(time, text, said[i + 1][2]))
    return system, tuple(turns)


def _questions(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read `QA`: instruction, question and answer."""
    out = []
    for i, entry in enumerate(raw.get("QA") or ()):
        if not isinstance(entry, Mapping) or "q" not in entry or "a" not in entry:
            raise ItemError(f"QA: expected q and a in entry {i + 1}, got {entry!r}")
        text = " ".join(part for part in (entry.get("i"), entry["q"]) if part)
        tag = "<video>\n" if i == 0 else ""
        out += [{"from": "human", "value": tag + text}, {"from": "gpt", "value": entry["a"]}]
    return out


def _message(turn: Any, i: int) -> tuple[str, float | None, str]:
    if not isinstance(turn, Mapping):
        raise ItemError(f"conversations: expected an object in turn {i + 1}, got {type(turn).__name__}")
    role = _ROLES.get(turn.get("from", turn.get("role")))
    if role is None:
        raise ItemError(
            f"conversations: expected who speaks in turn {i + 1}, got {turn.get('from', turn.get('role'))!r}"
        )
    text = turn.get("value", turn.get("content"))
    # a stream's own messages hold a frame, not words
    text = "" if text is None and role == "stream" else text
    if not isinstance(text, str):
        raise ItemError(f"conversations: expected text in turn {i + 1}, got {type(text).__name__}")
    time = next((turn[key] for key in ("timestamps", "timestamp", "time") if turn.get(key) is not None), None)
    return role, None if time is None else _seconds(f"time of turn {i + 1}", time), text


def _spoken(said: list[tuple[str, float | None, str]]) -> tuple[Turn, ...]:
    """Read a stream's turns: a question is answered by what is said next, other answers are given unasked."""
    turns: list[Turn] = []
    question = ""
    for role, time, text in said:
        if role == "human":
            question = text if not question else f"{question}\n{text}"
        elif role == "gpt":
            turns.append(Turn(time, question, text))
            question = ""
    if not turns:
        raise ItemError("conversation: expected something that is said, got none")
    return tuple(turns)


def _check_order(turns: Sequence[Turn], *, needed: bool) -> None:
    if not needed:
        return
    before = 0.0
    for i, turn in enumerate(turns):
        if turn.time is None:
            raise ItemError(f"timestamps: expected one for each question, got none for question {i + 1}")
        if turn.time < before:
            raise ItemError(f"timestamps: expected them in order, got {turn.time} after {before}")
        before = turn.time


def _template(raw: Mapping[str, Any]) -> str:
    template = raw["query_template"]
    text = template.get("value") if isinstance(template, Mapping) else template
    if not isinstance(text, str) or "<bbox>" not in text:
        raise ItemError(f"query_template: expected a value with <bbox>, got {template!r}")
    return text


def _sequence(raw: Mapping[str, Any], root: Path) -> tuple[tuple[Path, ...], tuple[Box, ...]]:
    """Read pictures and their boxes; the boxes tell the pictures' times."""
    files = _strings("all_image_files", raw.get("all_image_files"))
    folder = root / str(raw.get("video") or "")
    boxes = []
    for i, entry in enumerate(raw.get("image_bboxes") or ()):
        box = entry.get("bbox") if isinstance(entry, Mapping) else None
        if not isinstance(box, Sequence) or len(box) != 4:
            raise ItemError(f"image_bboxes: expected timestamp and bbox in entry {i + 1}, got {entry!r}")
        boxes.append(Box(_seconds(f"timestamp of image_bboxes entry {i + 1}", entry.get("timestamp")), list(box)))
    if len(boxes) != len(files):
        raise ItemError(f"image_bboxes: expected one for each of {len(files)} pictures, got {len(boxes)}")
    if any(after.time <= before.time for before, after in itertools.pairwise(boxes)):
        raise ItemError("image_bboxes: expected timestamps in order, got others")
    return tuple(_file(folder, file, "all_image_files") for file in files), tuple(boxes)


def _strings(name: str, value: Any) -> list[str]:
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not value
        or not all(isinstance(x, str) for x in value)
    ):
        raise ItemError(f"{name}: expected names of files, got {value!r}"[:200])
    return list(value)


def _one(video: Any) -> str:
    """Return the one name; VideoLLaMA3 writes a list."""
    names = [video] if isinstance(video, str) else video
    if not isinstance(names, Sequence) or len(names) != 1 or not isinstance(names[0], str):
        raise ItemError(f"video: expected one name, got {video!r}"[:200])
    return names[0]


def _file(root: Path, name: str, field: str) -> Path:
    """Find a file, also one whose name was written without its ending.

    A dot in the name of a folder, or in the file's own, does not hinder.
    """
    path = root / name
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)):
        if candidate.is_file() or (field == "video" and candidate.is_dir()):
            return candidate
    raise ItemError(f"{field}: expected a file, got {path}, which does not exist")
