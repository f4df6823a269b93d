"""Shared parts of the commands: encoder, memory and pictures from options, and answers in the terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vmemory.banks import Memory
from vmemory.cli.errors import UserError, user_input
from vmemory.cli.terminal import Terminal, plain_table
from vmemory.encoders import FrameEncoder
from vmemory.search.presets import video_bank
from vmemory.search.video_search import Answer, VideoSearch
from vmemory.sources.pictures import read_picture
from vmemory.sources.places import kind_of

# what watches a video where nothing else is asked for; README tells why
POLICY, BUDGET = "merging", "16MiB"
# answers to one question lie at least this many seconds apart
APART = 4.0
# seconds from which on a time is a date: 2001-09-09
DATES = 1e9
DTYPES: dict[str, torch.dtype | str] = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": "int8",
    "int4": "int4",
}


class Question(NamedTuple):
    """A sentence or a picture with its answers; `truth` in seconds if it is known."""

    text: str
    image: np.ndarray | None
    answers: list[Answer]
    truth: float | None = None


def make_encoder(name: str | None = None) -> FrameEncoder:
    """Make the default encoder, or the one that a file names."""
    encoder = FrameEncoder()
    if name not in (None, encoder.name):
        raise UserError(f"the memory was written with encoder {name!r}, this vmemory has {encoder.name!r}")
    return encoder


def make_bank(
    encoder: FrameEncoder,
    policy: str,
    rule: str | None,
    budget: str | None,
    entries: int | None,
    dtype: str,
    keep: int | None = None,
) -> Memory:
    """Make the memory that the options of `vmemory stream` describe."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if budget is not None and entries is not None:
        raise UserError("budget, entries: expected one of them, got both")
    with user_input():
        return video_bank(
            policy, encoder.grid, encoder.dim, rule=rule, entries=entries, budget=budget, dtype=DTYPES[dtype], keep=keep
        )


def check_writable(path: Path, *, folder: bool) -> None:
    """Raise an error now if a path cannot be written, and not after minutes of work."""
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"{path}: {'not a directory' if folder else 'is a directory'}")
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place}: not a directory")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place}: cannot be written to")


def read_image(path: Path) -> np.ndarray:
    """Read a picture file as uint8 RGB `[H, W, 3]`."""
    if not path.is_file():
        raise UserError(f"{path}: {f'{kind_of(path)}, expected a picture' if path.exists() else 'no such file'}")
    try:
        return read_picture(path)
    # decoders may raise any exception on damaged or hostile files
    except Exception as error:
        raise UserError(f"{path}: not a picture that can be read ({error})") from error


def answer_all(
    stream: VideoSearch, texts: Sequence[str], images: Sequence[tuple[str, np.ndarray]], k: int
) -> list[Question]:
    """Ask every sentence and every named picture."""
    asked = [Question(text, None, stream.ask(text, k, apart=APART)) for text in texts]
    return asked + [Question(name, image, stream.find(image, k, apart=APART)) for name, image in images]


def question(text: str) -> str:
    """Return a question as it was typed, independent of the locale.

    Raises:
        UserError: The question is empty.
    """
    # under LC_ALL=C bytes of other letters arrive as surrogates
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if not any(letter.isprintable() and not letter.isspace() for letter in text):
        raise UserError(f"question: expected words, got {text!r}")
    return text


def timecode(seconds: float) -> str:
    """Return seconds as a time code, `333.5` as `5:33`, with hours if there are any; `?` for NaN."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return f"-{timecode(-seconds)}"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def moment(seconds: float) -> str:
    """Return a time as a date if it counts from 1970, else as a time code."""
    if not DATES <= seconds < 1e11:
        return timecode(seconds)
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def span_text(answer: Answer) -> str:
    """Return the merged span of an entry as text, empty for a single frame."""
    if answer.stop <= answer.start:
        return ""
    start, stop = timecode(answer.start), timecode(answer.stop)
    return f"{start} to {stop}" if start != stop else f"{answer.stop - answer.start:.1f} s"


def concepts_text(answer: Answer) -> str:
    """Return the likeliest concept, and others with at least a tenth of its probability."""
    return ", ".join(name for rank, (name, p) in enumerate(answer.concepts) if rank == 0 or p >= 0.1)


def print_note(terminal: Terminal, stream: VideoSearch) -> None:
    """Print the limits of a memory's answers."""
    if note := stream.facts.get("note"):
        terminal.line(f"note: {note}")


def print_answers(terminal: Terminal, questions: Sequence[Question]) -> None:
    """Print a table for each question: times, similarities and concepts of its answers."""
    for asked in questions:
        truth = "" if asked.truth is None else f"  (truly at {timecode(asked.truth)})"
        # not the title of the table, which would be wrapped to its width
        terminal.line(f"{'picture ' if asked.image is not None else ''}{asked.text}{truth}", style="bold")
        table = plain_table("at", "span", "score", "tier", "nearest concepts", right=("at", "score", "tier"))
        for answer in asked.answers:
            at, score, tier = timecode(answer.time), f"{answer.score:.2f}", str(answer.level + 1)
            table.add_row(at, span_text(answer), score, tier, concepts_text(answer))
        terminal.print(table)
        terminal.line()
