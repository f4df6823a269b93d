"""Try other warps and stages for the Triton kernels: `python -m benchmarks.tune --out tune.json`, on a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from benchmarks.cases import ADJACENT_SIMILARITY, GRID_POOL, Case
from benchmarks.timing import Rotation, timed

WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4)


@contextmanager
def launched_with(**options: Any) -> Iterator[None]:
    """Launch every Triton kernel with these options instead of its own, within a context."""
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **(kwargs | options))

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def microseconds(case: Case, inputs: Rotation, rounds: int = 15) -> float:
    for _ in range(3):
        case.run(inputs())
    return sorted(timed(case.run, inputs()) for _ in range(rounds))[rounds // 2] * 1e6


def tuned(case: Case) -> dict[str, Any]:
    inputs = Rotation(case.input(device="cuda").detach().requires_grad_(case.backward))
    found = {"as shipped": microseconds(case, inputs)}
    for warps, stages in product(WARPS, STAGES):
        with launched_with(num_warps=warps, num_stages=stages):
            found[f"{warps} warps, {stages} stages"] = microseconds(case, inputs)
    best = min(found, key=found.__getitem__)
    return {"case": case.name, "best": best, "shipped_over_best": found["as shipped"] / found[best], "us": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    given = parser.parse_args()
    rows = []
    for case in (*GRID_POOL, *ADJACENT_SIMILARITY):
        rows.append(tuned(case))
        given.out.write_text(json.dumps(rows, indent=1))
        print(f"{case.name}: {rows[-1]['best']}, shipped ÷ best {rows[-1]['shipped_over_best']:.2f}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
