"""Faults put into the CUDA kernels on purpose: the emulated device has to find each. `make test-simt` runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.simt_build import ROOT, build


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    found: str
    """What the report begins with."""
    tests: tuple[str, ...]
    unit: str = ""

    @property
    def source(self) -> str:
        return self.unit or self.file.removesuffix(".cuh")


REPLACE = ("tests/test_ring.py", "-k", "native_replace and (dtype1 or float32)")
PUSH = ("tests/test_ring.py", "-k", "native_push")
SELECT = ("tests/test_select_tokens.py", "-k", "native_matches")
POOL = ("tests/test_grid_pool.py", "-k", "native_matches or frame_mean")
BANK = ("tests/test_bank_op.py", "-k", "test_cases")

MUTANTS = {
    "a barrier of a block": Mutant(
        "ring.cuh",
        "if (lane() == 0) held[0][warp()] = ab, held[1][warp()] = bb;\n    __syncthreads();",
        "if (lane() == 0) held[0][warp()] = ab, held[1][warp()] = bb;",
        "race: reads after a write of its block",
        REPLACE,
    ),
    "a barrier of the grid": Mutant(
        "ring.cuh",
        "find_products<kMean>();\n  grid.sync();",
        "find_products<kMean>();",
        "race: ",
        REPLACE,
    ),
    "a fence": Mutant(
        "ring.cuh",
        "__threadfence();\n  const bool last",
        "const bool last",
        "race: writes after a read of another block",
        PUSH,
    ),
    "a bound": Mutant(
        "ring.cuh",
        "if (first + k * kThreads < units) held[k]",
        "if (first + k * kThreads <= units) held[k]",
        "reads ",
        PUSH,
    ),
    "a barrier of a warp": Mutant(
        "select_tokens.cuh",
        "const Found found = find(g, bits, true);\n      __syncwarp();",
        "const Found found = find(g, bits, true);",
        "race: writes after a read of its block",
        SELECT,
    ),
    "a mask": Mutant(
        "select_tokens.cuh",
        "__ballot_sync(~0u, found.digit >= 0)",
        "__ballot_sync(0xffffu, found.digit >= 0)",
        "a lane calls a collective that leaves it out",
        SELECT,
    ),
    "zeros": Mutant(
        "select_tokens.cuh",
        "at_.histogram[b] = 0;",
        ";",
        "reads what nothing has written",
        SELECT,
    ),
    "a barrier before a sum": Mutant(
        "grid_pool.cuh",
        "sums[first][pack * V + v] = sum.x[v];\n  __syncthreads();",
        "sums[first][pack * V + v] = sum.x[v];",
        "race: ",
        POOL,
    ),
    "a barrier between levels": Mutant(
        "bank_push.cuh",
        "if (column) column[target * RK] = column[slot * RK];\n    }\n    __syncthreads();",
        "if (column) column[target * RK] = column[slot * RK];\n    }",
        "race: ",
        BANK,
        unit="bank",
    ),
    "two writers of a link": Mutant(
        "bank_step.cuh",
        "if (c.inserted >= 0 && place == c.inserted + 1) return -1;",
        "",
        "race: writes after a write of its block",
        BANK,
        unit="bank",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulated_device_misses(name: str) -> None:
    mutant = MUTANTS[name]
    into = ROOT / "build/simt/mutants" / mutant.source
    sources(into / "csrc", mutant)
    library = build(into / "build", checked=True, csrc=into / "csrc", unit=mutant.source)
    command = [sys.executable, "-m", "pytest", "-p", "tests.simt", "-p", "no:cacheprovider", "-q", "-x", *mutant.tests]
    done = subprocess.run([*command, "--simt", library], cwd=ROOT, capture_output=True, text=True, check=False)
    reports = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("  ") and " x " in line]
    assert any(report.startswith(mutant.found) for report in reports), done.stdout[-3000:]


def sources(to: Path, mutant: Mutant) -> None:
    """`csrc` with the mutant's fault; files that stay as they were keep their times."""
    for path in (ROOT / "csrc").rglob("*"):
        copy = to / path.relative_to(ROOT / "csrc")
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        text = path.read_text()
        if path.name == mutant.file:
            assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r} is there {text.count(mutant.old)} times"
            text = text.replace(mutant.old, mutant.new)
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    for path in to.rglob("*"):
        if not (ROOT / "csrc" / path.relative_to(to)).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
