from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vmemory.ops
from vmemory.testing import assert_within_budget

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = load("cases")


@pytest.mark.parametrize("case", [*cases.GRID_POOL, *cases.ADJACENT_SIMILARITY], ids=lambda case: case.name)
def test_what_is_timed_is_right(case):
    x = case.input(frames=3)
    wide = x.detach().double().requires_grad_(case.backward)
    assert_within_budget(case.run(x), case.reference(x), case.reference(wide))


def test_written_bytes_of_a_case_are_those_of_its_output():
    for case in cases.GRID_POOL:
        if case.backward:
            continue
        x = case.input(frames=8)
        out = case.run(x)
        tokens = out[0] if isinstance(out, tuple) else out
        assert tokens.numel() / x.numel() == pytest.approx(case.written)


def test_every_operator_has_its_call_cost_timed():
    module = load("bench_call_cost")
    calls = module.calls()
    assert set(calls) == set(module.PUBLIC)
    for call in calls.values():
        call.public(call.x)
        call.bare(call.x)


def test_report_writes_a_table_and_a_roofline(tmp_path):
    info = {
        "case": "area", "bytes": 1e6, "flops": 2e6, "ms": 0.1, "best_ms": 0.09, "floor_ms": 0.05, "ratio_to_floor": 2.0,
        "best_ratio_to_floor": 1.8, "bound": "bytes", "gb_per_s": 10.0, "gflop_per_s": 20.0, "copy_gb_per_s": 20.0,
        "matmul_gflop_per_s": 100.0, "peak_mb": 1.0, "launches": None, "quiet": "9/11", "eager_over_ours": 3.0,
        "matmul_and_topk_over_ours": 2.0, "eager_over_ours_best": 2.5,
    }  # fmt: skip
    results = {
        "machine_info": {"device": "a processor", "threads": 2, "torch": "2", "vmemory": "0", "matmul_rate": 1e11},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [{"group": "grid_pool", "extra_info": info, "commit": "0123456789abcdef"}],
    }
    report = load("report")
    text = report.table(json.loads(json.dumps(results)))
    assert "| quiet rounds | eager ÷ ours | matmul and topk ÷ ours |" in text
    assert "Commit 0123456789ab." in text
    assert "| area | 0.10 | 0.09 | 0.05 | bytes | 2.00 | 1.80 | 10.0 | 20.0 | 1.00 | – | 9/11 | 3.00 | 2.00 |" in text
    report.roofline(results, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000


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
