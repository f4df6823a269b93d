"""Fixtures: `pytest benchmarks/bench_grid_pool.py --benchmark-json=FILE`, then `python -m benchmarks.report FILE`."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.timing import Copy, Race, Rotation, Run, launches, matmul_rate, peak_bytes, wait_for_quiet
from vmemory import __version__
from vmemory.ops._native import STATUS
from vmemory.testing import assert_within_budget

OURS = "vmemory"

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# These variables hold torch and its matrix products to a level. They are read at the first computation.
TORCH_LIMITS = {
    "x86-64-v3": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "x86-64-v2": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def pytest_configure() -> None:
    # Otherwise the operators of one level would race torch's for a better processor.
    os.environ.update(TORCH_LIMITS.get(STATUS.level, {}))
    # Freed memory stays in the process, as on a GPU. Otherwise the operating system clears every output page by page,
    # and a virtual machine fetches it from its host again, and this would be timed.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", help="device of the tensors, cpu or cuda")
    parser.addoption("--bench-wait", type=float, default=0.0, help="seconds to wait for a quiet machine before a round")
    parser.addoption("--bench-rounds", type=int, default=11, help="interleaved rounds a case")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = torch.device(config.getoption("--bench-device"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    machine_info |= {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vmemory": __version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "level": "" if device.type == "cuda" else STATUS.level,
        "matmul_rate": matmul_rate(device),
    }


@pytest.fixture(scope="session")
def copy(request: pytest.FixtureRequest) -> Copy:
    return Copy(torch.device(request.config.getoption("--bench-device")))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--bench-device")


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, copy: Copy) -> Callable[..., None]:
    """Time `ours` in turn with the others and a copy.

    `calls` is the number of steps in one call; `moved` and `flops` are the bytes and operations of one step.
    """
    rounds, patience = request.config.getoption("--bench-rounds"), request.config.getoption("--bench-wait")
    machine = torch.device(request.config.getoption("--bench-device"))

    def run(
        case: str,
        ours: Run,
        inputs: Callable[[], torch.Tensor],
        moved: float,
        flops: float,
        calls: int = 1,
        **others: Run,
    ) -> None:
        peak, started = peak_bytes(ours, inputs()), launches(ours, inputs())
        product = matmul_rate(machine)
        contest = Race({OURS: ours, "copy": copy, **others}, inputs)
        contest.round(list(contest.contestants))
        contest.seconds.clear()
        quiet = []

        def others_first() -> tuple[tuple, dict]:
            quiet.append(wait_for_quiet(patience))
            contest.round(["copy", *others])
            contest.warm_up(OURS)
            # pytest-benchmark times our call next, on the next cold input
            return (contest.inputs(),), {}

        def call(x: torch.Tensor) -> None:
            ours(x)
            if x.is_cuda:
                torch.cuda.synchronize()

        benchmark.pedantic(call, setup=others_first, rounds=rounds, iterations=1)
        contest.seconds[OURS] = list(benchmark.stats.stats.data)
        rate, best_rate = copy.bytes / contest.median("copy"), copy.bytes / contest.best("copy")
        product = max(product, matmul_rate(machine))
        seconds, best = contest.median(OURS) / calls, contest.best(OURS) / calls
        floor, best_floor = (max(moved / r, flops / product) for r in (rate, best_rate))
        benchmark.extra_info |= {
            "case": case,
            "bytes": moved,
            "flops": flops,
            "ms": seconds * 1e3,
            "best_ms": best * 1e3,
            "floor_ms": floor * 1e3,
            "bound": "bytes" if moved / rate >= flops / product else "flops",
            "ratio_to_floor": seconds / floor,
            "best_ratio_to_floor": best / best_floor,
            "gb_per_s": moved / seconds / 1e9,
            "gflop_per_s": flops / seconds / 1e9,
            "copy_gb_per_s": rate / 1e9,
            "matmul_gflop_per_s": product / 1e9,
            "peak_mb": peak / 1e6,
            "launches": None if started is None else started / calls,
            "quiet": f"{sum(quiet)}/{len(quiet)}",
        }
        for name in others:
            benchmark.extra_info[f"{name}_over_ours"] = contest.median(name) / calls / seconds
            benchmark.extra_info[f"{name}_over_ours_best"] = contest.best(name) / calls / best

    return run


@pytest.fixture
def race(device: str, measure: Callable[..., None]) -> Callable[[Case], None]:
    """Check a case, then time it against eager PyTorch, torch.compile and a copy, one call of each in turn."""

    def run(case: Case) -> None:
        x = case.input(device=device)
        assert_within_budget(
            case.run(x), case.reference(x), case.reference(x.detach().double().requires_grad_(case.backward))
        )
        torch._dynamo.reset()
        inputs = Rotation(x if case.backward else x.detach())
        others = {"eager": case.reference, "compile": case.compiled()}
        measure(case.name, case.run, inputs, case.bytes(x), case.flops(x), **others)

    return run
