from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import vmemory.ops

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_levels_stand_side_by_side_and_the_worse_is_quoted():
    module = load("op_table")
    committed = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    rows = []
    for level, worse in (("x86-64-v3", 1.5), ("x86-64-v4", 1.0)):
        for row in committed["benchmarks"]:
            info = row["extra_info"] | {"level": level}
            rows.append(
                row | {"extra_info": info | {k: v / worse for k, v in info.items() if k.endswith("_over_ours")}}
            )
    head, _, *lines = module.table(committed | {"benchmarks": rows}).splitlines()
    assert head == "| operator | case | x86-64-v4: time, × floor | x86-64-v3: time, × floor | others ÷ ours |"
    least = module.found(committed | {"benchmarks": rows}, module.ROWS[0])["x86-64-v3"]["eager_over_ours"]
    assert f"eager {least:.2g}×" in lines[0]


def test_readme_and_the_page_show_the_committed_run():
    """Every figure of both tables is in `benchmarks/results/cpu.json`, and no operator is left out."""
    module = load("op_table")
    committed = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert module.table(committed, module.SHORT) in (ROOT / "README.md").read_text(), (
        "run python -m benchmarks.op_table"
    )
    assert module.table(committed) in page, "run python -m benchmarks.op_table"
    assert module.kernels() in page, "run python -m benchmarks.op_table"
    public = {name for name in vmemory.ops.__all__ if hasattr(getattr(vmemory.ops, name), "backends")}
    # bank_push_ decides first, so its rows time bank_decide too
    assert {op for row in module.ROWS for op in row.ops} == public - {"bank_decide"}
