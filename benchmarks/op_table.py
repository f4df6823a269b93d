"""Write the operators' tables into README.md and docs/benchmarks.md: `python -m benchmarks.op_table [RESULTS.json]`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import vmemory.ops
from vmemory.ops._registry import OPS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs/benchmarks.md"
TABLE = re.compile(r"^\| operator \|.*\n(?:^\|.*\n)+", re.MULTILINE)
PEERS = {
    "compile": "compiled",
    "faiss": "faiss flat",
    "list": "list of frames",
    "matmul_and_topk": "matmul + topk",
    "masked_sdpa": "masked SDPA",
    "one_call_a_stream": "one call a stream",
    "peer": "list-based original",
    "product": "the bare product",
    "products": "the bare products",
    "sdpa_of_the_valid": "SDPA on the valid part",
    "tome": "ToMe with N × N scores",
}


class Row(NamedTuple):
    """One row: its operators, its description, the benchmark file, and the group and case in the run."""

    ops: tuple[str, ...]
    shown: str
    file: str
    group: str
    case: str


ROWS = (
    Row(("grid_pool",), "256 × 16×16×1152 → 8×8", "grid_pool", "grid_pool", "area 16→8"),
    Row(("grid_pool_ragged",), "256 grids to 16×16, 8×8 or 4×4", "grid_pool", "grid_pool", "ragged 16, 8 and 4"),
    Row(("adjacent_similarity",), "256 × 256×1152, by token", "adjacent_similarity", "adjacent_similarity", "token"),
    Row(
        ("similarity_topk",),
        "1e5 × 384, 1 query",
        "similarity_topk",
        "similarity_topk: 100,000 × 384 float32",
        "1 query",
    ),
    Row(
        ("similarity_topk",),
        "1e5 × 384, 64 queries",
        "similarity_topk",
        "similarity_topk: 100,000 × 384 float32",
        "64 queries",
    ),
    Row(
        ("similarity_topk",),
        "1e6 × 384, 1 query",
        "similarity_topk",
        "similarity_topk: 1,000,000",
        "1 query, a million rows",
    ),
    Row(
        ("similarity_topk",),
        "1e5 × 384 in int8, 1 query",
        "similarity_topk",
        "similarity_topk: 100,000 × 384 in",
        "1 query, 8 bits",
    ),
    Row(
        ("bipartite_match", "token_merge"),
        "match and merge 512 of 2,048 × 64",
        "token_merge",
        "token_merge: match",
        "2,048 tokens, 64 float32",
    ),
    Row(
        ("bipartite_match", "token_merge"),
        "match and merge 512 of 2,048 × 1,152 bfloat16",
        "token_merge",
        "token_merge: match",
        "2,048 tokens, 1,152 bfloat16",
    ),
    Row(
        ("token_merge", "token_unmerge"),
        "merge and spread 8,192 × 1,152, with gradient",
        "token_merge",
        "token_merge: merge, spread",
        "8,192 tokens, 1,152",
    ),
    Row(
        ("adjacent_merge",),
        "one merge in 21 slots of 196×896",
        "adjacent_merge",
        "adjacent_merge",
        "frame, 21 of 196×896",
    ),
    Row(("select_tokens",), "300,000 of 1,000,000", "select_tokens", "select_tokens", "300,000 of 1,000,000"),
    Row(("compact",), "half of 512 MB", "select_tokens", "compact", "half of 512 MB"),
    Row(("gated_fusion",), "729 × 1,152", "gated_fusion", "gated_fusion", "729 tokens"),
    Row(
        ("gated_fusion",),
        "196 × 3,584, bfloat16",
        "gated_fusion",
        "gated_fusion",
        "196 tokens, 3,584 channels, bfloat16",
    ),
    Row(
        ("memory_attention",),
        "196 queries, 10 of 40 slots of 196 × 896 valid",
        "memory_attention",
        "memory_attention: 196 queries",
        "10 of 40 slots valid, float32",
    ),
    Row(
        ("attention_column_sums",),
        "12 heads of 2,048 × 2,048 × 64",
        "attention_column_sums",
        "attention_column_sums",
        "2048 × 2048, float32",
    ),
    Row(("ring_push_",), "one frame 196×896", "ring", "ring_push_", "float32"),
    Row(("ring_read",), "32 slots of 196×896", "ring", "ring_read", "float32"),
    Row(("slot_replace_",), "one frame 196×896 into 32 slots", "ring", "slot_replace_", "flat float32"),
    Row(("bank_push_",), "one frame 16×16×1152 into 24/24/144", "bank", "bank: one frame", "24/24/144, 16×16×1152"),
    Row(("bank_push_",), "64 streams, a frame 8×8×256 each", "bank", "bank: 64 streams", "64 streams, 8×8×256"),
    Row(
        ("bank_plan", "bank_gather"),
        "600 frames 16×16×1152 at once",
        "bank",
        "bank: a clip",
        "24/24/144, 600 of 16×16×1152 float32",
    ),
    Row(
        ("quantize_slots",),
        "12,544 × 3,584 bfloat16 to int8",
        "quantize_slots",
        "quantize_slots",
        "to int8 from bfloat16",
    ),
    Row(
        ("dequantize_slots",),
        "int8 to 12,544 × 3,584 bfloat16",
        "quantize_slots",
        "quantize_slots",
        "from int8 to bfloat16",
    ),
)

# the rows that README shows
SHORT = tuple(row for row in ROWS if row.shown in (
    "256 × 16×16×1152 → 8×8", "1e5 × 384, 1 query", "match and merge 512 of 2,048 × 64", "729 × 1,152",
    "196 queries, 10 of 40 slots of 196 × 896 valid", "one frame 16×16×1152 into 24/24/144",
))  # fmt: skip


def found(results: dict[str, Any], row: Row) -> dict[str, dict[str, Any]]:
    """Return the figures of a row by level; KeyError if the run has no such case."""
    by_level: dict[str, dict[str, Any]] = {}
    for entry in results["benchmarks"]:
        if entry["group"].startswith(row.group) and entry["extra_info"]["case"] == row.case:
            # groups of one prefix, such as forward and backward, may have cases of one name: the first counts
            by_level.setdefault(entry["extra_info"].get("level", ""), entry["extra_info"])
    if not by_level:
        raise KeyError(f"{row.group}: no case {row.case!r} in this run")
    return by_level


def _beside(by_level: dict[str, dict[str, Any]]) -> str:
    """Return the peers of a row with their time over ours, at the level where it is least."""
    least: dict[str, float] = {}
    for info in by_level.values():
        for key, value in info.items():
            if key.endswith("_over_ours"):
                name = key.removesuffix("_over_ours")
                least[name] = min(value, least.get(name, value))
    return ", ".join(f"{PEERS.get(name, name)} {value:.2g}×" for name, value in least.items())


def _measured(info: dict[str, Any]) -> str:
    return f"{info['ms']:.3g} ms, {info['ratio_to_floor']:.2f}×"


def table(results: dict[str, Any], rows: Sequence[Row] = ROWS) -> str:
    """Return the table as Markdown, a column for each level that was measured, best first."""
    levels = sorted({entry["extra_info"].get("level", "") for entry in results["benchmarks"]}, reverse=True)
    heads = [f"{level}: time, × floor" if level else "time, × floor" for level in levels]
    lines = [
        f"| operator | case | {' | '.join(heads)} | others ÷ ours |",
        f"|---|---|{'---:|' * len(levels)}---|",
    ]
    for row in rows:
        by_level = found(results, row)
        cells = (
            ", ".join(f"`{op}`" for op in row.ops),
            row.shown,
            *(_measured(by_level[level]) if level in by_level else "–" for level in levels),
            _beside(by_level),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kernels() -> str:
    """Return, as Markdown, which kernels each operator has and where it is timed."""
    lines = ["| operator | gradient | Triton | CUDA C++ | `benchmarks/…` |", "|---|---|---|---|---|"]
    files = {op: row.file for row in ROWS for op in row.ops}
    for op, file in sorted(files.items()):
        backends = getattr(vmemory.ops, op).backends
        has = ["yes" if there else "–" for there in (f"{op}_backward" in OPS, backends.triton, backends.cuda)]
        lines.append(f"| `{op}` | {' | '.join(has)} | `bench_{file}.py` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op_table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / "cpu.json", help="a committed run")
    results = json.loads(parser.parse_args().results.read_text())
    for page, made in ((README, [table(results, SHORT)]), (PAGE, [table(results), kernels()])):
        given = iter(made)
        page.write_text(TABLE.sub(lambda found, given=given: next(given), page.read_text()))


if __name__ == "__main__":
    main()
