"""A baseline without eyes: the best guess of one who reads questions and sees nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from vmemory.data.world.questions import Question


def blind_accuracy(known: Sequence[Question], asked: Sequence[Question]) -> dict[str, float]:
    """Measure the share of right answers a kind, of one who knows the answers to other questions and no pictures.

    The guess is the answer that was right most often for the same words, else for the same kind; of answers that were
    right as often the first in order of the alphabet.

    Args:
        known: Questions with their answers, of another split.
        asked: Those to answer.

    Raises:
        ValueError: A kind is asked about of which nothing is known.
    """
    by_text: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for question in known:
        for key in ((question.kind, question.text), (question.kind,)):
            by_text[key][question.answer] += 1
    best = {key: min(answers, key=lambda answer: (-answers[answer], answer)) for key, answers in by_text.items()}
    right: dict[str, list[bool]] = defaultdict(list)
    for question in asked:
        if (question.kind,) not in best:
            raise ValueError(f"known: expected questions of kind {question.kind!r}, got none")
        guess = best.get((question.kind, question.text), best[(question.kind,)])
        right[question.kind].append(guess == question.answer)
    return {kind: sum(answers) / len(answers) for kind, answers in right.items()}
