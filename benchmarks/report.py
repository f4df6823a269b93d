"""Write a benchmark run as JSON, Markdown tables and a roofline: `python -m benchmarks.report RESULTS...`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

COLUMNS = {
    "case": "case",
    "level": "level",
    "ms": "ms, median",
    "best_ms": "best",
    "floor_ms": "floor",
    "bound": "bound by",
    "ratio_to_floor": "× floor",
    "best_ratio_to_floor": "× floor, best",
    "gb_per_s": "GB/s",
    "gflop_per_s": "GFLOP/s",
    "python_us": "Python, µs",
    "peak_mb": "peak MB",
    "launches": "launches",
    "quiet": "quiet rounds",
}

MACHINE = ("device", "threads", "torch", "vmemory", "cpu_capability", "matmul_rate")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def table(results: dict[str, Any]) -> str:
    """Return the run as Markdown, one table per operator."""
    machine, rows = results["machine_info"], results["benchmarks"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, vmemory {machine['vmemory']}, "
        f"{results['datetime'][:16]}.",
        "",
        "Floor: bytes read and written ÷ the copy rate measured between the calls, or operations ÷ the rate of a",
        "matrix product measured before and after, whichever takes longer. Cold cache, contestants in turn.",
    ]
    if results.get("note"):
        lines += ["", results["note"]]
    for (group, commit), members in groupby(rows, key=lambda row: (row["group"], row["commit"])):
        members = [row["extra_info"] for row in members]
        rates, products = (sorted(info[key] for info in members) for key in ("copy_gb_per_s", "matmul_gflop_per_s"))
        lines += ["", f"## {group}", ""]
        lines.append(f"Copy: {rates[0]:.1f} to {rates[-1]:.1f} GB/s. Matrix product: {products[-1]:.0f} GFLOP/s.")
        lines[-1] += f" Commit {commit[:12]}."
        beside = dict.fromkeys(key for info in members for key in info if key.endswith("_over_ours"))
        known = {key: name for key, name in COLUMNS.items() if any(key in info for info in members)}
        columns = known | {key: key.removesuffix("_over_ours").replace("_", " ") + " ÷ ours" for key in beside}
        lines += ["", "| " + " | ".join(columns.values()) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(_cell(info.get(key)) for key in columns) + " |" for info in members]
    return "\n".join(lines) + "\n"


def roofline(results: dict[str, Any], target: Path) -> None:
    """Draw each case by its arithmetic intensity, below the copy rate and the matrix-product rate of the run.

    Narrow dtypes may be above the matrix-product rate, which is measured in float32. Calls that consist of overhead
    only are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row for row in results["benchmarks"] if row["extra_info"]["flops"] > 0 and "python_us" not in row["extra_info"]
    ]
    if not rows:
        return
    copy = max(row["extra_info"]["copy_gb_per_s"] for row in rows) * 1e9
    peak = results["machine_info"]["matmul_rate"]
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    intensity = [row["extra_info"]["flops"] / row["extra_info"]["bytes"] for row in rows]
    edges = [min(intensity) / 2, peak / copy, max(2 * max(intensity), 4 * peak / copy)]
    axes.plot(edges, [min(edge * copy, peak) / 1e9 for edge in edges], color="black", linewidth=1.2)
    axes.annotate(f"copy {copy / 1e9:.1f} GB/s", (edges[0], 2 * edges[0] * copy / 1e9), va="bottom", fontsize=8)
    axes.annotate(f"matmul {peak / 1e9:.0f} GFLOP/s", (edges[1], 1.1 * peak / 1e9), va="bottom", fontsize=8)
    ops: dict[str, list[tuple[float, float]]] = {}
    for row, x in zip(rows, intensity, strict=True):
        info = row["extra_info"]
        name = row["group"].split(":")[0].removesuffix(", forward + backward")
        ops.setdefault(name, []).append((x, info["flops"] / info["ms"] / 1e6))
    colours = pyplot.get_cmap("tab20")
    for i, (name, points) in enumerate(ops.items()):
        axes.scatter(*zip(*points, strict=True), s=24, color=colours(i % 20), label=name, zorder=3)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title=results["machine_info"]["device"]
    )
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(target, dpi=150)


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Merge the results of several processes of one run, without the single timings."""
    runs = [json.loads(file.read_text()) for file in files]
    rows = []
    for run in runs:
        level = {"level": run["machine_info"]["level"]} if run["machine_info"].get("level") else {}
        commit = run["commit_info"].get("id", "unknown")
        rows += [
            {"group": x["group"], "extra_info": level | x["extra_info"], "commit": commit} for x in run["benchmarks"]
        ]
    # cases of one name side by side; the order of the files else
    places = {key: i for i, key in enumerate(dict.fromkeys((x["group"], x["extra_info"]["case"]) for x in rows))}
    groups = {key: i for i, key in enumerate(dict.fromkeys(x["group"] for x in rows))}
    rows.sort(key=lambda x: (groups[x["group"]], places[x["group"], x["extra_info"]["case"]]))
    machine = {key: runs[0]["machine_info"][key] for key in MACHINE}
    machine["matmul_rate"] = max(run["machine_info"]["matmul_rate"] for run in runs)
    return {"machine_info": machine, "datetime": runs[0]["datetime"], "benchmarks": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files written by --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write into")
    parser.add_argument("--note", default="", help="a sentence about the run, written above the tables")
    parser.add_argument("--name", default="latest", help="name of the files written, without ending")
    given = parser.parse_args()
    results = merged(given.results) | ({"note": given.note} if given.note else {})
    given.out.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (given.out / f"{given.name}.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (given.out / f"{given.name}.md").write_text(text)
    roofline(results, given.out / f"{given.name}.png")
    print(text)


if __name__ == "__main__":
    main()
