"""Run all tests and benchmarks that need a GPU, in one call, and write the results to one folder.

`python -m benchmarks.gpu_suite --out FOLDER` runs the most valuable parts first: it builds the native library for the
device, runs the tests marked `gpu`, and times the five families of operators against eager and compiled PyTorch and the
named peers. This fits nine minutes. The remaining time goes to compute-sanitizer, to a 7B model with and without a
memory (transformers 5.18 or later), to other warps and stages for the Triton kernels, and to all other benchmarks. Each
part writes its log, even if other parts fail. `--plan` prints order, time and commands, without a device.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# the largest number of seconds for each part, the most valuable first; a longer call scales them
SECONDS = {"build": 140, "tests": 160, "families": 225, "sanitizer": 60, "model": 100, "tune": 60, "bench": 420}
# similarity search, token merging, adaptive pooling, gated fusion, ring-buffer memory: cases that stand for each
FAMILIES = {
    "bench_similarity_topk": ("test_search[1]", "test_search[8]", "test_search[64]"),
    "bench_token_merge": (
        "test_match_and_merge[2,048 tokens, 64 and 1,152-bfloat16]",
        "test_match_and_merge[2,048 tokens, 64 and 1,152-float32]",
    ),
    "bench_grid_pool": (
        "test_grid_pool[area 16\\u21928 bf16]",
        "test_grid_pool[one frame, area 16\\u21928 + mean, norm]",
    ),
    "bench_gated_fusion": ("test_forward[729 tokens, bfloat16]", "test_forward[729 tokens]"),
    "bench_ring": ("test_push[bfloat16]", "test_replace[flat-bfloat16]"),
}
# seconds between the request to end, on which pytest prints and saves its results, and the kill
GRACE = 20
# the least seconds in which a part can give a result
LEAST = GRACE + 15


def run(name: str, command: list[str], seconds: float, out: Path, **environment: str) -> dict[str, object]:
    """Run one part with its output in `<out>/<name>.log`; return how it ended and how long it took."""
    if seconds < LEAST:
        return {"exit": "no time left", "seconds": 0.0}
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            # in a process session of its own, so that no child keeps the device busy afterwards
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n")
            return {"exit": str(error), "seconds": 0.0}
        code = ended(child, seconds - GRACE)
    spent = time.perf_counter() - start
    tail = (out / f"{name}.log").read_text(errors="replace").splitlines()[-3:]
    print(f"{name}: exit {code} after {spent:.0f} s", *tail, sep="\n  ", flush=True)
    return {"exit": code, "seconds": round(spent, 1)}


def ended(child: subprocess.Popen[bytes], seconds: float) -> int | str:
    """Wait for a child, end its process session after `seconds`, and return its status."""
    code: int | str
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        code = "out of time"
        child.send_signal(signal.SIGINT)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = "out of time, killed"
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return code


def time_of(parts: list[str], left: float) -> float:
    """Return the seconds for the next part: its own, more in a long call, all if no other part fits."""
    share = SECONDS[parts[0]] * max(1.0, left / sum(SECONDS[part] for part in parts))
    return left if left - share < LEAST else share


def plan(parts: list[str], left: float, out: Path, workers: int) -> None:
    """Print each part with its time limit, if every part uses its limit."""
    commands_ = commands(out, workers)
    for index, name in enumerate(parts):
        share = time_of(parts[index:], left)
        left -= share
        print(f"{name}: {share:.0f} s" if share >= LEAST else f"{name}: no time left")
        for command in timings(name, out).values() if name in ("families", "bench") else [commands_[name]]:
            print("   ", shlex.join(map(str, command)))


def machine(commit: str) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,memory.total", "--format=csv,noheader"]
    facts: dict[str, object] = {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
    }
    if shutil.which(query[0]):
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        facts["driver, clocks, memory"] = told
    if find_spec("triton"):
        import triton

        facts["triton"] = triton.__version__
    return facts


def marked() -> list[str]:
    """Return the test files with tests for a GPU; other files need not be importable on this machine."""
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]


def build() -> list[str]:
    """Return the command that builds the native libraries in place and prints what they contain."""
    return ["sh", "-c", f"{sys.executable} setup.py build_ext --inplace && {sys.executable} -m vmemory.info"]


def pytest(*arguments: str) -> list[str]:
    limit = ["--timeout", "240"] if find_spec("pytest_timeout") else []
    return [sys.executable, "-m", "pytest", "-q", "--tb", "short", *limit, *arguments]


def commands(out: Path, workers: int) -> dict[str, list[str]]:
    side_by_side = ["-n", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return {
        "build": build(),
        "tests": pytest("-m", "gpu", *side_by_side, *marked()),
        # our kernels that make decisions, on small inputs
        "sanitizer": [
            sanitizer, "--error-exitcode", "3",
            *pytest("-m", "gpu and not slow", "-k", "native and not replay and not captured and not waits", "-x",
                    "tests/test_ring_kernels.py", "tests/test_select_tokens_kernels.py", "tests/test_bank_kernels.py"),
        ],
        "tune": [sys.executable, "-m", "benchmarks.tune", "--out", str(out / "tune.json")],
        "model": [sys.executable, "-m", "benchmarks.attach_memory", "--device", "cuda", "--large"],
    }  # fmt: skip


def timings(part: str, out: Path) -> dict[str, list[str]]:
    """Return the commands of a timing part: one process for each benchmark file."""
    stems = (
        list(FAMILIES) if part == "families" else sorted(file.stem for file in (ROOT / "benchmarks").glob("bench_*.py"))
    )
    made = {}
    for stem in stems:
        file = f"benchmarks/{stem}.py"
        chosen = [f"{file}::{case}" for case in FAMILIES[stem]] if part == "families" else [file]
        # a longer run of the same file replaces the results of the chosen cases
        made[stem] = pytest(*chosen, "--bench-device", "cuda", f"--benchmark-json={out / f'{stem}.json'}")
    return made


def bench(part: str, seconds: float, out: Path) -> dict[str, object]:
    """Run the commands of `timings`, then write a report of all results so far."""
    end = time.perf_counter() + seconds
    done: dict[str, object] = {}
    files = timings(part, out)
    # compiling the peers takes time, and some complete results are better than all incomplete
    least = 30.0 if part == "families" else 90.0
    for index, (stem, command) in enumerate(files.items()):
        left = end - time.perf_counter()
        share = min(left, max(left / (len(files) - index), least))
        done[stem] = run(f"{part}-{stem}", command, share, out)
    found = [str(path) for path in sorted(out.glob("bench_*.json")) if path.stat().st_size]
    if found:
        report = [sys.executable, "-m", "benchmarks.report", *found, "--out", str(out), "--name", "gpu"]
        done["report"] = run("report", report, 60, out)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--pack", type=Path, help="an archive of the folder, written anew after each part")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--plan", action="store_true", help="print what would run, in which order and how long")
    parser.add_argument("--commit", default="unknown", help="what is being measured, where no git is at hand")
    parser.add_argument("--skip", nargs="*", default=[], choices=SECONDS, help="parts to leave out")
    given = parser.parse_args()
    parts = [name for name in SECONDS if name not in given.skip]
    cores = os.cpu_count() or 1
    workers = max(1, min(12, cores - 2))
    out = given.out.resolve()
    if given.plan:
        plan(parts, 60 * given.minutes, out, workers)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: the suite needs one")
    # a shell ignores SIGINT for background jobs, and children would inherit this
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * given.minutes
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "VMEMORY_CUDA": "1",
        "VMEMORY_CUDA_ARCHS": f"{major}{minor}-real",
        # the places of cmake, ninja and nvcc
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"]),
        "PYTHONUNBUFFERED": "1",
    }
    alone = {
        "tests": {"OMP_NUM_THREADS": str(max(1, cores // workers))},
        # without the caching allocator, memory behind an allocation belongs to no other tensor
        "sanitizer": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    }
    state: dict[str, object] = {"machine": machine(given.commit), "parts": (done := {})}
    to_run = commands(out, workers)
    for index, name in enumerate(parts):
        share = time_of(parts[index:], end - time.perf_counter())
        if name in ("families", "bench"):
            done[name] = bench(name, share, out)
        else:
            done[name] = run(name, to_run[name], share, out, **environment, **alone.get(name, {}))
        (out / "suite.json").write_text(json.dumps(state, indent=1))
        if given.pack is not None:
            with tarfile.open(given.pack, "w:gz") as archive:
                archive.add(out, out.name)


if __name__ == "__main__":
    main()
