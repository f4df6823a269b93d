"""Accuracies out of answers, with confidence intervals over streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vmemory.data.world import Guess
from vmemory.eval.cells import UNCOMPRESSED
from vmemory.eval.records import Records
from vmemory.eval.scoring import is_right, nearness
from vmemory.eval.streams import Asked, AskedStream

DRAWS = 1000
# groups of questions about the past, by the seconds since the answer was last to be seen: at most so many
AGES = {"to 30 s": (0.0, 30.0), "30 to 120 s": (30.0, 120.0), "over 120 s": (120.0, float("inf"))}
# rows of those who see no frames
MAJORITY, BLIND = "majority", "blind"


class Score(NamedTuple):
    """A share of right answers, the 95 % interval of a bootstrap over streams, and `questions`, their number."""

    mean: float
    low: float
    high: float
    questions: int


@dataclass
class Row:
    """The scores of one cell, or of a guess.

    Attributes:
        name: Of the cell; `"majority"` and `"blind"` guess without frames.
        tokens: Visual tokens in a prompt, mean over moments; None for guesses.
        nbytes: Bytes of the memory; None for guesses.
        right: Scores by group: `"all"`, `"now"`, `"past"`, the ages, and the kinds.
        oracle: The same for answers out of the entries held, where they are known.
        near: Scores of answers in numbers: how near they are.
        kept: Accuracy divided by that of the uncompressed model, for `"now"`, `"past"` and the ages.
    """

    name: str
    tokens: float | None
    nbytes: int | None
    right: dict[str, Score]
    oracle: dict[str, Score] = field(default_factory=dict)
    near: dict[str, Score] = field(default_factory=dict)
    kept: dict[str, Score] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        parts = {
            name: {group: dict(zip(Score._fields, map(_plain, score), strict=True)) for group, score in part.items()}
            for name in ("right", "oracle", "near", "kept")
            if (part := getattr(self, name))
        }
        return {"name": self.name, "tokens": self.tokens, "nbytes": self.nbytes, **parts}


def _plain(value: float) -> float | int:
    return value if isinstance(value, int) else round(value, 4)


def score_rows(
    records: Records, streams: Sequence[AskedStream], cells: Sequence[str], known: Sequence[Any] | None = None
) -> list[Row]:
    """Score the answers of all cells, and those of two guesses.

    Streams that some cell has not answered are left out for all of them, so that all rows are about the same questions.

    Args:
        records: The answers.
        streams: The streams and their questions.
        cells: Names of the cells.
        known: Questions with `kind`, `text` and `answer` from which the guesses are learned; None = those about the
            other streams.

    Raises:
        ValueError: No stream was answered by all cells.
    """
    done = [stream for stream in streams if all(records.get(stream.name, cell) is not None for cell in cells)]
    if not done:
        raise ValueError("streams: expected at least one that every memory has answered, got none")
    draws = np.random.RandomState(0).randint(len(done), size=(DRAWS, len(done)))
    guesses: dict[str, list[list[bool]]] = {MAJORITY: [], BLIND: []}
    for stream in done:
        others = known or [q for other in done if other is not stream for q in other.questions]
        guess = Guess(others)
        guesses[MAJORITY].append([guess.of_kind(q.kind) == q.answer for q in stream.questions])
        guesses[BLIND].append([guess.of_words(q.kind, q.text) == q.answer for q in stream.questions])
    rows = [Row(name, None, None, _grouped(done, values, draws)) for name, values in guesses.items()]
    base: list[list[bool]] | None = None
    for cell in cells:
        held = [record for stream in done if (record := records.get(stream.name, cell)) is not None]
        right = [
            [is_right(q, text) for q, text in zip(stream.questions, record.written, strict=True)]
            for stream, record in zip(done, held, strict=True)
        ]
        near = [
            [nearness(q, text) for q, text in zip(stream.questions, record.written, strict=True)]
            for stream, record in zip(done, held, strict=True)
        ]
        row = Row(
            cell, float(np.mean([record.tokens for record in held])), max(record.nbytes for record in held),
            _grouped(done, right, draws), near=_grouped(done, near, draws),
        )  # fmt: skip
        if all(record.oracle is not None for record in held):
            row.oracle = _grouped(done, [record.oracle or [] for record in held], draws)
        base = right if cell == UNCOMPRESSED else base
        if base is not None:
            row.kept = _kept(done, right, base, draws)
        rows.append(row)
    return rows


def _groups(done: Sequence[AskedStream]) -> dict[str, Callable[[Asked], bool]]:
    groups: dict[str, Callable[[Asked], bool]] = {"all": lambda q: True}
    for when in ("now", "past"):
        groups[when] = lambda q, when=when: q.when == when  # type: ignore[misc]
    for name, (low, high) in AGES.items():
        groups[name] = lambda q, low=low, high=high: (  # type: ignore[misc]
            q.when != "now" and q.age is not None and low < q.age <= high
        )
    for kind in dict.fromkeys(q.kind for stream in done for q in stream.questions):
        groups[f"kind {kind}"] = lambda q, kind=kind: q.kind == kind  # type: ignore[misc]
    return groups


def _sums(done: Sequence[AskedStream], values: Sequence[Sequence[Any]], group: Callable[[Asked], bool]) -> np.ndarray:
    """Return sum and number of the values of a group, for each stream: `[streams, 2]`; None is no value."""
    out = np.zeros((len(done), 2))
    for i, (stream, given) in enumerate(zip(done, values, strict=True)):
        chosen = [v for q, v in zip(stream.questions, given, strict=True) if v is not None and group(q)]
        out[i] = sum(chosen), len(chosen)
    return out


def _grouped(done: Sequence[AskedStream], values: Sequence[Sequence[Any]], draws: np.ndarray) -> dict[str, Score]:
    found = {}
    for name, group in _groups(done).items():
        sums = _sums(done, values, group)
        if sums[:, 1].sum():
            found[name] = _score(sums[:, 0], sums[:, 1], draws, int(sums[:, 1].sum()))
    return found


def _kept(
    done: Sequence[AskedStream], right: Sequence[Sequence[bool]], base: Sequence[Sequence[bool]], draws: np.ndarray
) -> dict[str, Score]:
    found = {}
    groups = _groups(done)
    for name in ("now", "past", *AGES):
        ours, theirs = _sums(done, right, groups[name]), _sums(done, base, groups[name])
        if theirs[:, 0].sum():
            found[name] = _score(ours[:, 0], theirs[:, 0], draws, int(ours[:, 1].sum()))
    return found


def _score(over: np.ndarray, under: np.ndarray, draws: np.ndarray, count: int) -> Score:
    tops, bottoms = over[draws].sum(1), under[draws].sum(1)
    drawn = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Score(float(over.sum() / under.sum()), float(low), float(high), count)
