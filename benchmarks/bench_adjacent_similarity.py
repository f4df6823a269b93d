from __future__ import annotations

import pytest

from benchmarks.cases import ADJACENT_SIMILARITY


@pytest.mark.parametrize("case", ADJACENT_SIMILARITY, ids=lambda case: case.name)
@pytest.mark.benchmark(group="adjacent_similarity")
def test_adjacent_similarity(case, race):
    race(case)
