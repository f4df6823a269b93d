"""Streams with questions: what an evaluation watches, and asks at which moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmemory.data.world import Question, World, ask, view_of

# uint8 frames `[n, 3, H, W]` or `[n, H, W, 3]` with their seconds
Piece = tuple[Tensor, list[float]]
_PIECE = 128
# seconds by which the answer to "when" may be wrong and still be near
NEAR = 5.0


class Asked(NamedTuple):
    """A question about a stream, and its right answer.

    Attributes:
        time: Second at which it is asked, with all frames up to it; infinite for the end.
        text: What the model reads.
        answer: The right answer; a letter if there are options.
        kind: What kind of question it is.
        options: The options to choose from; empty where the answer is free.
        when: `"now"`, `"past"`, or None where that is not known.
        age: Seconds since the answer was last to be seen, if known.
        interval: Numbers (low, high) between which an answer is near.
    """

    time: float
    text: str
    answer: str
    kind: str
    options: tuple[str, ...] = ()
    when: str | None = None
    age: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class AskedStream:
    """A stream and the questions about it.

    Attributes:
        name: Of the stream.
        questions: In order of time.
        frames: Function that yields the frames in pieces, oldest first.
        most_frames: A number of frames that the stream does not exceed.
        world: The world that the stream shows, if it shows one.
    """

    name: str
    questions: tuple[Asked, ...]
    frames: Callable[[], Iterator[Piece]]
    most_frames: int
    world: World | None = None

    def moments(self) -> Iterator[tuple[float, list[int]]]:
        """Yield each second at which there are questions, and their places."""
        places: dict[float, list[int]] = {}
        for place, question in enumerate(self.questions):
            places.setdefault(question.time, []).append(place)
        yield from places.items()


def world_question(question: Question) -> Asked:
    """Return a question about a world; the answer to "when" is near within five seconds."""
    when = int(question.answer) if question.kind == "past_when" else None
    return Asked(
        question.time, question.text, question.answer, question.kind, (), question.kind.split("_")[0], question.age,
        None if when is None else (when - NEAR, when + NEAR),
    )  # fmt: skip


def world_stream(
    seed: int, seconds: int, *, split: str = "test", moments: int = 4, count: int = 16, pace: float = 1.0
) -> AskedStream:
    """Make a stream of a world, drawn in memory, with questions at moments of its second half.

    Args:
        seed, seconds, split, pace: Of the world.
        moments: Number of moments; the last one is the stream's end.
        count: Questions at each moment, of kinds that take turns.

    Raises:
        TypeError, ValueError: A bad argument.
    """
    world = World(seed, seconds, split=split, pace=pace)
    rng = np.random.RandomState([seed, 4])
    asked: list[Question] = []
    for now in sorted(set(np.linspace(seconds // 2, seconds - 1, moments).astype(int).tolist())):
        asked += ask(view_of(world, now), rng, None, count)
    name = f"{split} {seconds} s, seed {seed}"
    return AskedStream(name, tuple(map(world_question, asked)), lambda: world_pieces(world), seconds, world)


def world_pieces(world: World) -> Iterator[Piece]:
    """Yield the pictures of a world, one a second."""
    for first in range(0, world.seconds, _PIECE):
        seconds = np.arange(first, min(first + _PIECE, world.seconds))
        yield torch.from_numpy(world.render(seconds)), seconds.astype(float).tolist()


def up_to(pieces: Iterator[Piece], moments: list[float]) -> Iterator[tuple[float, list[Piece]]]:
    """Yield for each moment, in order, the frames that have come since the one before, cutting pieces where needed."""
    rest: Piece | None = None
    for moment in moments:
        due: list[Piece] = []
        while rest is not None or (rest := next(pieces, None)) is not None:
            frames, seconds = rest
            # the clock of a container rounds
            ready = sum(second <= moment + 1e-6 for second in seconds) if math.isfinite(moment) else len(seconds)
            if ready:
                due.append((frames[:ready], seconds[:ready]))
            if ready < len(seconds):
                rest = frames[ready:], seconds[ready:]
                break
            rest = None
        yield moment, due
