"""Compare what a model wrote with the right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vmemory.eval.streams import Asked

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_right(asked: Asked, written: str) -> bool:
    """Return whether an answer is right: the letter of the right option, or the same words."""
    if asked.options:
        return chosen_letter(written, asked.options) == asked.answer
    return plain(written) == plain(asked.answer)


def plain(text: str) -> str:
    """Return words in lower case with single spaces, without a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def chosen_letter(written: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer chooses, or None if that is not clear.

    A letter alone at the beginning counts, or one after "answer is"; otherwise the only option whose words occur.
    """
    letters = _LETTERS[: len(options)]
    text = written.strip()
    first = re.match(rf"\(?([{letters}])(?:[).:,]|\s*$|\s*\n)", text)
    if first is None:
        first = re.search(rf"\b[Aa]nswer(?: is)?:?\s*\(?([{letters}])(?![A-Za-z])", text)
    if first is not None:
        return first[1]
    named = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if re.search(rf"\b{re.escape(plain(option))}(?!\w)", plain(text))
    ]
    return named[0] if len(named) == 1 else None


def nearness(asked: Asked, written: str) -> float | None:
    """Return how near an answer in numbers is to an interval, from 0 to 1; None for a question without one.

    One number counts 1 within the interval and 0 outside. Two numbers are a span, which counts its intersection with
    the interval divided by their union.
    """
    if asked.interval is None:
        return None
    low, high = asked.interval
    numbers = [float(number) for number in _NUMBER.findall(written)]
    if len(numbers) == 1:
        return float(low <= numbers[0] <= high)
    if len(numbers) != 2 or numbers[1] < numbers[0]:
        return 0.0
    start, stop = numbers
    shared, whole = min(high, stop) - max(low, start), max(high, stop) - min(low, start)
    return max(0.0, shared) / whole if whole > 0 else 1.0
