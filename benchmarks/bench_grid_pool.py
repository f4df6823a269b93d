from __future__ import annotations

import pytest

from benchmarks.cases import GRID_POOL


@pytest.mark.parametrize("case", GRID_POOL, ids=lambda case: case.name)
@pytest.mark.benchmark(group="grid_pool")
def test_grid_pool(case, race):
    race(case)
