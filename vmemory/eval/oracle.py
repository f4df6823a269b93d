"""Answers of one who sees only what a memory still holds: they tell losses of the memory from errors of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vmemory.banks.results import Entries
from vmemory.data.world import View, World, find
from vmemory.eval.streams import Asked


def seconds_shown(world: World, entries: Entries) -> np.ndarray:
    """Return the seconds `[n]` of a world that a memory's entries show, increasing.

    An entry of several frames is their mean; it shows the sight that most of its frames have in common, at the first
    second that has it. The size of an entry is not looked at.
    """
    shown = set()
    for start, stop in zip(entries.start.tolist(), entries.stop.tolist(), strict=True):
        span = range(int(start), min(int(stop), world.seconds - 1) + 1)
        if len(span) == 1:
            shown.add(span[0])
            continue
        sights = [(int(world.place[t]), *world.card[t].tolist(), int(world.number[t])) for t in span]
        most = Counter(sights).most_common(1)[0][0]
        shown.add(span[sights.index(most)])
    return np.array(sorted(shown), dtype=np.int64)


def oracle_right(world: World, seconds: np.ndarray, asked: Sequence[Asked]) -> list[bool]:
    """Return for each question whether these seconds alone give the right answer.

    A question that they do not allow to ask, because its card is not among them, counts as wrong.
    """
    if not len(seconds):
        return [False] * len(asked)
    view = View(world, seconds)
    known = {
        kind: {question.text: question.answer for question in find(view, kind)} for kind in {q.kind for q in asked}
    }
    return [known[question.kind].get(question.text) == question.answer for question in asked]
