"""The part of a product that `make test` runs."""

from __future__ import annotations

from itertools import product

import pytest

from tests.pairwise import pairs_of, pairwise, parameters


def cases_of(*sizes: int) -> list[dict[str, int]]:
    names = "abcdef"[: len(sizes)]
    return [dict(zip(names, values, strict=True)) for values in product(*map(range, sizes))]


@pytest.mark.parametrize("sizes", [(3,), (4, 5), (2, 2, 2), (6, 2, 3, 2), (5, 4, 3, 3), (7, 1, 2)])
def test_every_pair_is_in_the_part(sizes: tuple[int, ...]) -> None:
    cases = cases_of(*sizes)
    part = [cases[place] for place in pairwise(cases)]
    assert set().union(*map(pairs_of, part)) == set().union(*map(pairs_of, cases))
    # no fewer cases can hold the pairs of the two largest, and few more are taken
    largest = sorted((*sizes, 1))[-2:]
    assert largest[0] * largest[1] <= len(part) <= 1.5 * largest[0] * largest[1]


def test_two_parameters_keep_their_product() -> None:
    assert pairwise(cases_of(4, 7)) == list(range(28))


def test_pairs_that_are_left_out_on_purpose_are_not_asked_for() -> None:
    cases = [case for case in cases_of(3, 3, 3) if case["a"] != case["b"]]
    part = [cases[place] for place in pairwise(cases)]
    assert set().union(*map(pairs_of, part)) == set().union(*map(pairs_of, cases))


def test_no_cases() -> None:
    assert pairwise([]) == []


def test_the_same_part_every_time() -> None:
    assert pairwise(cases_of(6, 4, 3)) == pairwise(cases_of(6, 4, 3))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("kind", ["a", "b"])
@pytest.mark.parametrize(("x", "y"), [(1, [2]), (1, [4]), (5, [2])])
def test_a_test_of_three_parameters_runs_on_half_of_their_product(x, y, kind, flag, request) -> None:
    cases = [item for item in request.session.items if getattr(item, "originalname", "") == request.node.originalname]
    assert len(cases) <= (12 if request.config.getoption("--all") else 6)
    found = parameters(request.node)
    assert found == {"x,y": (id(x), id(y)), "kind": (id(kind),), "flag": (id(flag),)}
