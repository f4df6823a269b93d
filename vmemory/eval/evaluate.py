"""Evaluate many memories on the same streams: each stream is decoded and encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmemory._attach import adapter_of, base_of
from vmemory.eval.cells import Cell
from vmemory.eval.oracle import oracle_right, seconds_shown
from vmemory.eval.records import Record, Records
from vmemory.eval.streams import AskedStream, up_to
from vmemory.session.group import SessionGroup
from vmemory.session.prompt import Processor
from vmemory.session.session import VideoSession
from vmemory.sources import SourceError


def evaluate(
    model: nn.Module,
    processor: Processor,
    streams: Sequence[AskedStream],
    cells: Sequence[Cell],
    path: str | Path | None = None,
    *,
    name: str = "model",
    frame_tokens: int = 256,
    max_new_tokens: int = 16,
    done: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Records:
    """Ask a model about streams through many memories.

    Each stream is decoded once and encoded once, for all memories. At each moment with questions every memory is asked
    all of them in one batch, with what it holds then.

    Args:
        model: A model of a family that `attach` supports, in evaluation mode.
        processor: Its processor or tokenizer.
        streams: What to watch, and the questions.
        cells: The memories.
        path: A JSON-lines file for the answers. What it already holds is not asked again.
        name: Of the model, for the file.
        frame_tokens: Largest number of tokens of a frame.
        max_new_tokens: Largest number of tokens of an answer.
        done: Called with the number of streams that are finished.
        tell: Called with a line about a stream that cannot be read, which is left out.

    Returns:
        The answers.

    Raises:
        ValueError: No streams or cells, a memory that does not fit, or a file of another evaluation.
    """
    if not streams or not cells:
        raise ValueError(f"streams, cells: expected at least one of each, got {len(streams)} and {len(cells)}")
    header = {"model": name, "weights": fingerprint(model), "frame_tokens": frame_tokens, "answer": max_new_tokens}
    records = Records(None if path is None else Path(path), header)
    if records.cut and tell is not None:
        tell(records.cut)
    for count, stream in enumerate(streams, 1):
        records.ask(stream)
        missing = [cell for cell in cells if records.get(stream.name, cell.name) is None]
        if missing:
            try:
                found = watch(model, processor, stream, missing, frame_tokens, max_new_tokens)
            except SourceError as error:
                if tell is not None:
                    tell(f"{stream.name}: left out: {error}")
                continue
            for cell in missing:
                records.add(stream.name, cell.name, found[cell.name])
        if done is not None:
            done(count)
    return records


def watch(
    model: nn.Module,
    processor: Processor,
    stream: AskedStream,
    cells: Sequence[Cell],
    frame_tokens: int,
    max_new_tokens: int,
) -> dict[str, Record]:
    """Watch one stream with all memories at once, and ask at each moment; return the answers by cell."""
    together = adapter_of(base_of(model)).temporal_patch_size(base_of(model))
    # an odd last frame waits for its pair
    most = -(-stream.most_frames // together)
    memories = {cell.name: partial(cell.memory, most) for cell in cells}
    group = SessionGroup(model, processor, memories, frame_tokens=frame_tokens, reuse_prefix=False)
    moments = dict(stream.moments())
    size = len(stream.questions)
    written: dict[str, list[str]] = {cell.name: [""] * size for cell in cells}
    oracle: dict[str, list[bool]] = {cell.name: [False] * size for cell in cells}
    tokens = dict.fromkeys(written, 0)
    for moment, pieces in up_to(stream.frames(), list(moments)):
        for frames, seconds in pieces:
            group.push(frames, seconds)
        asked = [stream.questions[place] for place in moments[moment]]
        for name, session in group.sessions.items():
            answers = session.ask_all([question.text for question in asked], max_new_tokens)
            right = [False] * len(asked)
            if stream.world is not None:
                assert session.memory is not None
                right = oracle_right(stream.world, seconds_shown(stream.world, session.memory.entries()), asked)
            for place, answer, seen in zip(moments[moment], answers, right, strict=True):
                written[name][place], oracle[name][place] = answer, seen
            tokens[name] += session.num_tokens
    return {
        name: Record(
            written[name],
            oracle[name] if stream.world is not None else None,
            tokens[name] / len(moments),
            _bytes(session),
        )
        for name, session in group.sessions.items()
    }


def _bytes(session: VideoSession) -> int:
    return 0 if session.memory is None else session.memory.nbytes


def fingerprint(model: nn.Module) -> str:
    """Return a short name of a model's weights: other weights have another name, but for a chance in 2^48."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        facts: list[Any] = [name, list(weight.shape), flat[:8].tolist(), flat[-8:].tolist()]
        if flat.is_floating_point() and flat.numel() <= 2**20:
            facts.append(float(flat.to(torch.float64).sum()))
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:12]
