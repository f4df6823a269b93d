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
SHARES = {"build": 0.28, "tests": 0.30, "sanitizer": 0.08, "tune": 0.05, "model": 0.09, "bench": 0.20}
# what the goals are about
FIRST = ("bench_bank", "bench_similarity_topk", "bench_grid_pool", "bench_ring", "bench_token_merge")
# seconds between the request to end, which lets pytest print and save what it has, and the end
GRACE = 20
# below that nothing comes of a part
LEAST = GRACE + 15


def run(name: str, command: list[str], seconds: float, out: Path, **environment: str) -> dict[str, object]:
    """Run one part into `<out>/<name>.log`; how it ended and how long it took."""
    if seconds < LEAST:
        return {"exit": "no time left", "seconds": 0.0}
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            # a session of its own: what a part leaves running would hold the device
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
    """How a child that leads its own session ended, asked to after so long; it and all it started are gone then."""
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
    """Test files with tests for a GPU: the others need not be importable here."""
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]


def build() -> list[str]:
    """The native libraries in place, and the facts that say what they hold."""
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
        # kernels of our own that decide something, on small inputs
        "sanitizer": [
            sanitizer, "--error-exitcode", "3",
            *pytest("-m", "gpu and not slow", "-k", "native and not replay and not captured and not waits", "-x",
                    "tests/test_ring_kernels.py", "tests/test_select_tokens_kernels.py", "tests/test_bank_kernels.py"),
        ],
        "tune": [sys.executable, "-m", "benchmarks.tune", "--out", str(out / "tune.json")],
        "model": [sys.executable, "-m", "benchmarks.attach_memory", "--device", "cuda", "--large"],
    }  # fmt: skip


def bench(seconds: float, out: Path) -> dict[str, object]:
    """Every file of benchmarks in a process of its own, and a report of those that left figures."""
    end = time.perf_counter() + seconds
    done: dict[str, object] = {}
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"), key=lambda file: (file.stem not in FIRST, file.stem))
    for index, file in enumerate(files):
        left = end - time.perf_counter()
        # compiling what each is compared with takes its time: better some whole than all begun
        share = min(left, max(left / (len(files) - index), 90.0))
        timings = f"--benchmark-json={out / f'{file.stem}.json'}"
        done[file.stem] = run(file.stem, pytest(str(file), "--bench-device", "cuda", timings), share, out)
    found = [str(path) for path in sorted(out.glob("bench_*.json")) if path.stat().st_size]
    if found:
        report = [sys.executable, "-m", "benchmarks.report", *found, "--out", str(out), "--name", "gpu"]
        done["report"] = run("report", report, 60, out)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--pack", type=Path, help="an archive of the folder, written anew after each part")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--commit", default="unknown", help="what is being measured, where no git is at hand")
    parser.add_argument("--skip", nargs="*", default=[], choices=SHARES, help="parts to leave out")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: the suite needs one")
    # a shell that starts this in the background has it ignored, which children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * given.minutes
    major, minor = torch.cuda.get_device_capability()
    parts = [name for name in SHARES if name not in given.skip]
    cores = os.cpu_count() or 1
    workers = max(1, min(12, cores - 2))
    environment = {
        "VMEMORY_CUDA": "1",
        "VMEMORY_CUDA_ARCHS": f"{major}{minor}-real",
        # cmake, ninja and nvcc, wherever a shell would have found them
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/local/cuda/bin"]),
        "PYTHONUNBUFFERED": "1",
    }
    alone = {
        "tests": {"OMP_NUM_THREADS": str(max(1, cores // workers))},
        # an allocation each, so that what lies behind one is nobody's
        "sanitizer": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    }
    state: dict[str, object] = {"machine": machine(given.commit), "parts": (done := {})}
    to_run = commands(out, workers)
    for index, name in enumerate(parts):
        left = end - time.perf_counter()
        # what a part leaves of its time goes to those after it
        share = left * SHARES[name] / sum(SHARES[other] for other in parts[index:])
        if name == "bench":
            done[name] = bench(share, out)
        else:
            done[name] = run(name, to_run[name], share, out, **environment, **alone.get(name, {}))
        (out / "suite.json").write_text(json.dumps(state, indent=1))
        if given.pack is not None:
            with tarfile.open(given.pack, "w:gz") as archive:
                archive.add(out, out.name)


if __name__ == "__main__":
    main()
