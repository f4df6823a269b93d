"""A selection of a test's parameters in which every two values still meet.

A test with three or more independent parameters runs on the product of their values. Faults hang on one value or on
two that meet, hardly ever on three, so a part of the product in which every pair stands finds nearly all of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations, cycle
from typing import TypeVar

import pytest
import torch

T = TypeVar("T")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def pairs_of(case: Mapping[str, Hashable]) -> set[Hashable]:
    """The pairs of values that meet in a case, or its only value."""
    values = sorted(case.items(), key=lambda item: item[0])
    return set(combinations(values, 2)) or set(values)


def pairwise(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Places of a part of `cases` in which every pair stands that stands in `cases`; the same part every time.

    The case with most pairs that are still missing is taken next, of equals the first.
    """
    pairs = [pairs_of(case) for case in cases]
    missing: set[Hashable] = set().union(*pairs)
    # what a case adds only shrinks, so a case that still adds as much as when it was looked at last is the best
    waiting = [(-len(found), place) for place, found in enumerate(pairs)]
    heapq.heapify(waiting)
    chosen = []
    while missing:
        before, place = heapq.heappop(waiting)
        adds = pairs[place] & missing
        if len(adds) == -before:
            chosen.append(place)
            missing -= adds
        elif adds:
            heapq.heappush(waiting, (-len(adds), place))
    return sorted(chosen)


def parameters(item: pytest.Function) -> dict[str, Hashable]:
    """Which value each decorator of a test has here; values that stand in one decorator together are one.

    Values are told apart by identity, since not all can be compared, and every case of a decorator has the same object.
    """
    values = {name: id(value) for name, value in item.callspec.params.items()}
    found: dict[str, Hashable] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        found[",".join(names)] = tuple(values.pop(name) for name in names)
    # what is left comes from fixtures
    return found | values


def types_in_turn(cases: Iterable[T]) -> list[tuple[T, torch.dtype]]:
    """Pair the first case with every type and each other with one, since code is compiled anew for each pair."""
    first, *others = cases
    turns = zip(others, cycle(TYPES), strict=False)
    return [*((first, dtype) for dtype in TYPES), *turns]


def without_new_pairs(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Of each test function the cases that add no pair."""
    tests: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault((item.parent, item.originalname), []).append(item)
    out: set[pytest.Item] = set()
    for cases in tests.values():
        chosen = set(pairwise([parameters(case) for case in cases]))
        out.update(case for place, case in enumerate(cases) if place not in chosen)
    return out
