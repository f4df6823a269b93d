"""Interleaved, cold-cache timing, and the copy and product rates for comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Tensor], Any]


def last_level_cache(device: torch.device) -> int:
    """Return the bytes of the device's largest cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes) or 32 << 20


class Rotation:
    """Copies of an input, together at least five times the last-level cache; each use takes the next copy."""

    def __init__(self, x: Tensor) -> None:
        size = max(1, x.numel() * x.element_size())
        copies = -(-5 * last_level_cache(x.device) // size)
        self._inputs = [x] + [x.clone() for _ in range(copies - 1)]
        self._at = 0

    def __call__(self) -> Tensor:
        self._at = (self._at + 1) % len(self._inputs)
        return self._inputs[self._at]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._inputs)


class Copy:
    """A copy between two buffers whose pages are mapped; its rate defines the floors."""

    def __init__(self, device: torch.device) -> None:
        size = max(256 << 20, 5 * last_level_cache(device))
        self._from = torch.ones(size // 4, device=device)
        self._to = self._from.clone()
        self.bytes = 2 * size

    def __call__(self, _: Tensor) -> None:
        self._to.copy_(self._from)


def _busy_ticks() -> int:
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return int(user) + int(nice) + int(system)


def wait_for_quiet(seconds: float) -> bool:
    """Wait at most `seconds` until no other process computes on this machine; return whether this happened."""
    end = time.perf_counter() + seconds
    while True:
        before = _busy_ticks()
        time.sleep(0.2)
        # a tick is 10 ms of one core
        if _busy_ticks() - before <= 2:
            return True
        if time.perf_counter() > end:
            return False


def timed(run: Run, x: Tensor) -> float:
    """Return the seconds of one call, device work included; the result is freed outside the time."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, n: int = 1536) -> float:
    """Return the FLOP/s of a square matrix product, the best of three."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = min(timed(lambda b: a @ b, a) for _ in range(4))
    return 2 * n**3 / best


def peak_bytes(run: Run, x: Tensor) -> int:
    """Return the peak bytes that one call allocates in addition to earlier allocations."""
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run(x)
    held = peak = 0
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(run: Run, x: Tensor) -> int | None:
    """Return the number of kernels that one call starts on a CUDA device; None on the CPU."""
    if not x.is_cuda:
        return None
    run(x)
    with torch.profiler.profile() as profile:
        run(x)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@dataclass
class Race:
    """Contestants timed in turn on cold inputs, so that all of them see the same state of the machine."""

    contestants: dict[str, Run]
    inputs: Callable[[], Tensor]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def round(self, names: Sequence[str]) -> None:
        for name in names:
            self.warm_up(name)
            self.seconds.setdefault(name, []).append(timed(self.contestants[name], self.inputs()))

    def warm_up(self, name: str) -> None:
        """Call once outside the time, on another input.

        After seconds of idleness some hypervisors take freed memory back, and the next allocation would pay for it.
        """
        self.contestants[name](self.inputs())

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def best(self, name: str) -> float:
        return min(self.seconds[name])
