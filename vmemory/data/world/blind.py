"""A baseline without eyes: the best guess of one who reads questions and sees nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol

from vmemory.data.world.questions import Question


class Answered(Protocol):
    """A question of a kind, with its answer."""

    @property
    def kind(self) -> str:
        """Return the kind of question."""
        ...

    @property
    def text(self) -> str:
        """Return the words."""
        ...

    @property
    def answer(self) -> str:
        """Return the right answer."""
        ...


class Guess:
    """The guesses of one who knows the answers to some questions and no pictures.

    A guess is the answer that was right most often for the same words, else for the same kind; of answers that were
    right as often the first in order of the alphabet.

    Args:
        known: The questions whose answers are known.
    """

    def __init__(self, known: Sequence[Answered]) -> None:
        by_text: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for question in known:
            for key in ((question.kind, question.text), (question.kind,)):
                by_text[key][question.answer] += 1
        self._best = {
            key: min(answers, key=lambda answer: (-answers[answer], answer)) for key, answers in by_text.items()
        }

    def of_kind(self, kind: str) -> str | None:
        """Return the most frequent answer of a kind; None if no question of it is known."""
        return self._best.get((kind,))

    def of_words(self, kind: str, text: str) -> str | None:
        """Return the most frequent answer to the same words, else that of the kind; None if the kind is unknown."""
        return self._best.get((kind, text), self.of_kind(kind))


def blind_accuracy(known: Sequence[Question], asked: Sequence[Question]) -> dict[str, float]:
    """Measure the share of right answers a kind, of one who guesses from the words alone; see `Guess`.

    Args:
        known: Questions with their answers, of another split.
        asked: Those to answer.

    Raises:
        ValueError: A kind is asked about of which nothing is known.
    """
    guess = Guess(known)
    right: dict[str, list[bool]] = defaultdict(list)
    for question in asked:
        found = guess.of_words(question.kind, question.text)
        if found is None:
            raise ValueError(f"known: expected questions of kind {question.kind!r}, got none")
        right[question.kind].append(found == question.answer)
    return {kind: sum(answers) / len(answers) for kind, answers in right.items()}
