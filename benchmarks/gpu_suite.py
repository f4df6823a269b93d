"""Everything a machine with a GPU can tell, in one call and one folder.

`python -m benchmarks.gpu_suite --out FOLDER` builds the native library for the device, runs the tests marked `gpu`
(and a few under compute-sanitizer), tries other warps and stages for the Triton kernels, runs a 7B model
with and without a memory (transformers 5.18 or later), times every benchmark on the
device, and writes the report. Each part has its share of the time and leaves its log, whatever happens to the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SHARES = {"build": 0.30, "tests": 0.25, "sanitizer": 0.08, "tune": 0.08, "model": 0.09, "bench": 0.20}


def run(name: str, command: list[str], seconds: float, out: Path, **environment: str) -> dict[str, object]:
    """Run one part into `<out>/<name>.log`; how it ended and how long it took."""
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(seconds, 10),
                env={**os.environ, **environment},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    spent = time.perf_counter() - start
    tail = (out / f"{name}.log").read_text(errors="replace").splitlines()[-3:]
    print(f"{name}: exit {code} after {spent:.0f} s", *tail, sep="\n  ", flush=True)
    return {"exit": code, "seconds": round(spent, 1)}


def machine(commit: str) -> dict[str, object]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,memory.total", "--format=csv,noheader"]
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "driver, clocks, memory": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--commit", default="unknown", help="what is being measured, where no git is at hand")
    parser.add_argument("--skip", nargs="*", default=[], choices=SHARES, help="parts to leave out")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: the suite needs one")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * given.minutes
    major, minor = torch.cuda.get_device_capability()
    parts = [name for name in SHARES if name not in given.skip]
    python, results = sys.executable, out / "timings.json"
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    commands = {
        "build": [python, "setup.py", "build_ext", "--inplace", "--build-temp", str(out.parent / "vmemory-build")],
        "tests": [python, "-m", "pytest", "-m", "gpu", "-q", "-n", "6", "--dist", "loadfile", "--timeout", "120"],
        "sanitizer": [
            sanitizer,
            "--error-exitcode",
            "3",
            python,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-k",
            "replay or captured",
            "-q",
        ],
        "tune": [python, "-m", "benchmarks.tune", "--out", str(out / "tune.json")],
        "model": [python, "-m", "benchmarks.attach_memory", "--device", "cuda", "--large"],
        "bench": [python, "-m", "pytest", "benchmarks", "-q", "--bench-device", "cuda", f"--benchmark-json={results}"],
    }
    state: dict[str, object] = {"machine": machine(given.commit), "parts": (done := {})}
    for index, name in enumerate(parts):
        left = end - time.perf_counter()
        # what a part leaves of its time goes to those after it
        share = left * SHARES[name] / sum(SHARES[other] for other in parts[index:])
        done[name] = run(name, commands[name], share, out, VMEMORY_CUDA="1", VMEMORY_CUDA_ARCHS=f"{major}{minor}-real")
        (out / "suite.json").write_text(json.dumps(state, indent=1))
    if results.exists():
        run("report", [python, "-m", "benchmarks.report", str(results), "--out", str(out), "--name", "gpu"], 60, out)


if __name__ == "__main__":
    main()
