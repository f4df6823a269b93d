"""The end of the demo: a trained model watches a drawn world through a memory, and its answers are judged."""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vmemory.banks import format_bytes
from vmemory.cli.common import timecode
from vmemory.data.world import Question, View, World, ask
from vmemory.session import VideoSession
from vmemory.train.worldlm import load_worldlm

# seconds that are watched; each kind of question is asked so many times
SECONDS, EACH = 600, 4
# of the default memory, which leaves frames of four tokens whole
MEMORY = {"memory_budget": "384KiB"}
# seconds from which on something is long ago
_LONG_AGO = 120.0
_TOKENS = 4


class Told(NamedTuple):
    """A question, and what the model said."""

    question: Question
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.question.answer


class WorldAnswers(NamedTuple):
    """The answers of a model about a world.

    Attributes:
        frames, held, nbytes: Frames watched, visual tokens that are left of them, and their bytes.
        policy: Of the memory.
        watching, asking: Seconds.
        told: Questions and answers, kinds in turns.
    """

    frames: int
    held: int
    nbytes: int
    policy: str
    watching: float
    asking: float
    told: Sequence[Told]


def world_answers(seed: int = 0) -> WorldAnswers:
    """Let worldlm watch a world of the test split through the default memory, and ask about it at the end."""
    model, tokenizer = load_worldlm()
    world = World(seed, SECONDS, split="test")
    session = VideoSession(model, tokenizer, config=MEMORY, fps=1.0, frame_tokens=_TOKENS)
    started = clock.perf_counter()
    for second, picture in enumerate(world.render()):
        session.push(torch.from_numpy(picture)[None], time=[float(second)])
    watched = clock.perf_counter()
    questions = ask(View(world, np.arange(SECONDS)), np.random.RandomState(seed), None, EACH * 16)
    said = session.ask_all([question.text for question in questions], max_new_tokens=4)
    seconds = (watched - started, clock.perf_counter() - watched)
    told = [Told(question, text.strip()) for question, text in zip(questions, said, strict=True)]
    assert session.memory is not None
    return WorldAnswers(SECONDS, session.num_tokens, session.memory.nbytes, session.config.policy, *seconds, told)


def world_lines(answers: WorldAnswers) -> Iterator[str]:
    """Yield the results as lines: what was watched, the first question of each kind, and how many were right."""
    yield watched_text(answers)
    kinds: set[str] = set()
    for told in answers.told:
        if told.question.kind not in kinds:
            kinds.add(told.question.kind)
            row = told_row(told)
            yield f"{row['judged']:>5}  {told.question.text} {row['said']}{row['truth']}; {row['evidence']}"
    yield counted_text(answers)


def watched_text(answers: WorldAnswers) -> str:
    """Return a sentence about what was watched, and what is left of it."""
    return (
        f"worldlm, trained on drawn worlds, watched one that it never saw for {timecode(answers.frames)}: the "
        f"{answers.policy} memory holds {answers.held} of {answers.frames * _TOKENS} visual tokens, "
        f"{format_bytes(answers.nbytes)}. Watching took {answers.watching:.1f} s, {len(answers.told)} answers took "
        f"{answers.asking:.1f} s"
    )


def counted_text(answers: WorldAnswers) -> str:
    """Return how many answers were right, by the age of what they ask for."""
    parts = []
    for name, own in _by_age(answers.told).items():
        parts.append(f"{sum(told.right for told in own)} of {len(own)} about {name}")
    return f"right: {', '.join(parts)}"


def told_row(told: Told) -> dict[str, Any]:
    """Return the cells of a table's row: judged, said, truth where it was wrong, and evidence."""
    question = told.question
    if question.evidence is None:
        evidence = "nothing shows it by itself"
    else:
        first, last = (timecode(second) for second in question.evidence)
        when = f"at {first}" if first == last else f"from {first} to {last}"
        age = question.time - question.evidence[1]
        evidence = f"shown {when}" + (f", {timecode(age)} ago" if age else "")
    return {
        "right": told.right,
        "judged": "right" if told.right else "wrong",
        "text": question.text,
        "said": told.said or "nothing",
        "truth": "" if told.right else f" (truly {question.answer})",
        "answer": question.answer,
        "evidence": evidence,
    }


def _by_age(told: Sequence[Told]) -> dict[str, list[Told]]:
    out: dict[str, list[Told]] = {"now": [], "the last two minutes": [], "longer ago": [], "the whole stream": []}
    for one in told:
        age = one.question.age
        if one.question.kind.startswith("now"):
            out["now"].append(one)
        elif age is None:
            out["the whole stream"].append(one)
        else:
            out["longer ago" if age > _LONG_AGO else "the last two minutes"].append(one)
    return {name: own for name, own in out.items() if own}
