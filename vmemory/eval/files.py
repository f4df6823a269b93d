"""Streams with questions out of annotation files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmemory.data.online.benchmarks import BENCHMARKS, BenchmarkQuestion, read_benchmark, read_lines
from vmemory.data.online.item import SUFFIXES, Item, ItemError, read_item
from vmemory.data.online.reading import Skipped, read_json
from vmemory.data.world import World, questions_of, world_of
from vmemory.eval.streams import Asked, AskedStream, Piece, world_question
from vmemory.sources import FrameSource, SourceError

ONLINE = "online"
FORMATS = (ONLINE, *BENCHMARKS)
# tasks of OVO-Bench that its paper calls backward tracing, and real-time perception
_OVO = {
    **dict.fromkeys(("EPM", "ASI", "HLD"), "past"),
    **dict.fromkeys(("OCR", "ACR", "ATR", "STU", "FPD", "OJR"), "now"),
}
_PIECE = 32


class _Video(NamedTuple):
    path: Path
    start: float
    stop: float | None


def file_streams(
    path: str | Path, videos: str | Path | None = None, *, form: str = ONLINE, fps: float = 1.0
) -> tuple[list[AskedStream], list[Skipped]]:
    """Read streams and their questions; items about the same video are one stream.

    Args:
        path: JSON or JSON lines: items of VideoChat-Online's format, sets of them, or a benchmark's questions.
        videos: Folder of the videos; None = the file's own, or what a set says.
        form: `"online"` or a key of `vmemory.data.online.BENCHMARKS`.
        fps: Frames a second to look at.

    Returns:
        The streams, and what was left out: items that cannot be used, tracking items, and videos that cannot be read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown format, not JSON, or nothing in the file can be asked.
    """
    path = Path(path)
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    root = path.parent if videos is None else Path(videos)
    found: dict[_Video, list[Asked]] = defaultdict(list)
    worlds: dict[_Video, World] = {}
    if form == ONLINE:
        skipped = _online(path, root if videos is not None else None, found, worlds)
    else:
        questions, skipped = read_benchmark(path, form)
        for question in questions:
            try:
                found[_Video(_find(root, question.video), question.start, None)].append(_benchmark(question, form))
            except ItemError as error:
                skipped.append(Skipped(question.name, str(error)))
    streams = []
    for video, asked in found.items():
        try:
            streams.append(_stream(video, sorted(asked, key=lambda q: q.time), fps, worlds.get(video)))
        except SourceError as error:
            skipped.append(Skipped(str(video.path), str(error)))
    if not streams:
        reason = f"; {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{path}: expected questions about videos, got none that can be asked{reason}")
    return streams, skipped


def _online(
    path: Path, root: Path | None, found: dict[_Video, list[Asked]], worlds: dict[_Video, World]
) -> list[Skipped]:
    skipped: list[Skipped] = []
    for name, raw, folder in _raw_items(path, root):
        try:
            item = read_item(raw, folder, name)
        except ItemError as error:
            skipped.append(Skipped(*str(error).split(": ", 1)))
            continue
        if item.kind == "tracking" or item.video is None or item.reset or _follows_a_card(raw):
            kind = "tracking" if item.kind == "tracking" or _follows_a_card(raw) else item.kind
            skipped.append(Skipped(item.name, f"expected questions about a video's own times, got a {kind} item"))
            continue
        start, stop = item.clip or (0.0, None)
        video = _Video(item.video, start, stop)
        if isinstance(raw.get("world"), Mapping):
            worlds[video] = world_of(dict(raw["world"]))
            found[video] += map(world_question, questions_of(dict(raw)))
        else:
            found[video] += _turns(item)
    return skipped


def _follows_a_card(raw: Mapping[str, Any]) -> bool:
    turns = raw.get("conversations") or [None]
    return isinstance(turns[0], Mapping) and turns[0].get("kind") == "tracking"


def _raw_items(path: Path, root: Path | None) -> Iterator[tuple[str, Any, Path]]:
    """Yield name, item and folder of the videos."""
    loaded = read_lines(path) if path.suffix == ".jsonl" else read_json(path)
    if isinstance(loaded, list):
        folder = root or (path.parent / "videos" if (path.parent / "videos").is_dir() else path.parent)
        yield from ((f"{path.name}, item {i}", item, folder) for i, item in enumerate(loaded))
        return
    if not isinstance(loaded, dict) or not all(isinstance(s, dict) and "annotation" in s for s in loaded.values()):
        raise ValueError(f"{path}: expected a list of items, or sets with an annotation each")
    for entry in loaded.values():
        yield from _raw_items(path.parent / entry["annotation"], root or path.parent / entry.get("data_root", ""))


def _turns(item: Item) -> Iterator[Asked]:
    for turn in item.turns:
        text = turn.text.replace("<video>", "").replace("<image>", "").strip()
        # a stream item may speak unasked
        if text:
            yield Asked(math.inf if turn.time is None else turn.time, text, turn.answer, item.kind)


def _benchmark(question: BenchmarkQuestion, form: str) -> Asked:
    when = _OVO.get(question.kind) if form == "ovo-bench" else None
    time = math.inf if question.time is None else question.time
    return Asked(time, question.prompt(), question.answer, question.kind or form, question.options, when)


def _find(root: Path, name: str) -> Path:
    path = root / name
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)):
        if candidate.exists():
            return candidate
    raise ItemError(f"video: expected a file, got {path}, which does not exist")


def _stream(video: _Video, asked: list[Asked], fps: float, world: World | None) -> AskedStream:
    last = asked[-1].time
    stop = video.stop if math.isinf(last) else min(last + 1 / fps, video.stop or math.inf)
    source = FrameSource(video.path, fps, start=video.start, stop=stop)
    if source.expected is None:
        raise SourceError(f"{video.path}: expected a video that states its length")
    name = str(video.path) if not video.start else f"{video.path} from {video.start:g} s"
    # a video may last a little longer than it says
    return AskedStream(name, tuple(asked), partial(_pieces, source), source.expected + 8, world)


def _pieces(source: FrameSource) -> Iterator[Piece]:
    frames, seconds = [], []
    for frame in source:
        frames.append(torch.from_numpy(frame.image))
        seconds.append(frame.time)
        if len(frames) == _PIECE:
            yield torch.stack(frames), seconds
            frames, seconds = [], []
    if frames:
        yield torch.stack(frames), seconds
