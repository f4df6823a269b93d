"""`python -m pytest benchmarks/bench_grid_pool.py --benchmark-json=FILE`, then `python -m benchmarks.report FILE`."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.timing import Copy, Race, Rotation, launches, matmul_rate, peak_bytes, wait_for_quiet
from vmemory import __version__
from vmemory.testing import assert_within_budget

OURS = "vmemory"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", help="device of the tensors, cpu or cuda")
    parser.addoption("--bench-wait", type=float, default=0.0, help="seconds to wait for a quiet machine before a round")
    parser.addoption("--bench-rounds", type=int, default=11, help="interleaved rounds a case")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = torch.device(config.getoption("--bench-device"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    machine_info |= {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vmemory": __version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matmul_rate": matmul_rate(device),
    }


@pytest.fixture(scope="session")
def copy(request: pytest.FixtureRequest) -> Copy:
    return Copy(torch.device(request.config.getoption("--bench-device")))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark, copy: Copy) -> Callable[[Case], None]:
    """Checks a case, then times it against eager PyTorch, torch.compile and a copy, one call of each in turn."""
    device, rounds = request.config.getoption("--bench-device"), request.config.getoption("--bench-rounds")
    patience = request.config.getoption("--bench-wait")

    def run(case: Case) -> None:
        x = case.input(device=device)
        assert_within_budget(
            case.run(x), case.reference(x), case.reference(x.detach().double().requires_grad_(case.backward))
        )
        torch._dynamo.reset()
        others = {
            "eager": case.reference,
            "compile": case.compiled(),
            "copy": copy,
        }
        peak, started = peak_bytes(case.run, x), launches(case.run, x)
        inputs = Rotation(x.detach())
        if case.backward:
            inputs = Rotation(x)
        contest = Race({OURS: case.run, **others}, inputs)
        contest.round(list(contest.contestants))
        contest.seconds.clear()

        quiet = []

        def others_first() -> tuple[tuple, dict]:
            quiet.append(wait_for_quiet(patience))
            contest.round(["copy", *(name for name in others if name != "copy")])
            contest.warm_up(OURS)
            # the timed call is ours: pytest-benchmark runs it next, on the next cold input
            return (contest.inputs(),), {}

        def ours(x: torch.Tensor) -> None:
            case.run(x)
            if x.is_cuda:
                torch.cuda.synchronize()

        benchmark.pedantic(ours, setup=others_first, rounds=rounds, iterations=1)
        contest.seconds[OURS] = list(benchmark.stats.stats.data)
        size, flops = case.bytes(x), case.flops(x)
        rate = copy.bytes / contest.median("copy")
        seconds = contest.median(OURS)
        benchmark.extra_info |= {
            "case": case.name,
            "bytes": size,
            "flops": flops,
            "ms": seconds * 1e3,
            "best_ms": contest.best(OURS) * 1e3,
            "floor_ms": size / rate * 1e3,
            "ratio_to_floor": seconds * rate / size,
            "best_ratio_to_floor": contest.best(OURS) / contest.best("copy") * copy.bytes / size,
            "gb_per_s": size / seconds / 1e9,
            "copy_gb_per_s": rate / 1e9,
            "percent_of_copy": 100 * size / seconds / rate,
            "eager_over_ours": contest.median("eager") / seconds,
            "compile_over_ours": contest.median("compile") / seconds,
            "peak_mb": peak / 1e6,
            "launches": started,
            "quiet": f"{sum(quiet)}/{len(quiet)}",
        }

    return run
