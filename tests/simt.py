"""The CUDA C++ kernels on an emulated device, under tests that were written for the CPU's: `make simt`.

`pytest -p tests.simt --simt LIBRARY` puts the kernels of `csrc/cuda`, compiled as C++ over `csrc/simt`, in the place of
the CPU kernels of the same operators. Threads and blocks run in an order that depends on the test's name and on
`--simt-seed`. What the emulator finds is the test's failure, even where its values are right.
"""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vmemory.ops  # noqa: F401  defines the operators
from vmemory.ops._registry import OPS

NAMES = (
    "bank_decide", "bank_plan", "bank_push_", "gated_fusion", "gated_fusion_backward", "grid_pool",
    "grid_pool_backward", "grid_pool_stats", "ring_push_", "select_tokens", "similarity_topk", "slot_replace_",
    "token_merge", "token_merge_backward", "token_unmerge", "token_unmerge_backward",
)  # fmt: skip

# about the CPU alone, about graphs that torch compiles, and about Triton
LEFT_OUT = re.compile("thread|a_cpu_takes|compile|opcheck|interpreted")


def refused(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the CUDA kernel does not take what the CPU kernel takes: the package never asks it to."""
    if name.startswith("gated_fusion"):
        return args[0].dtype not in (torch.float32, torch.float64)
    if name == "bank_push_":
        return not args[0].is_floating_point()
    if name == "similarity_topk":
        query, memory = args[:2]
        return query.dtype == torch.float64 or memory.dtype == torch.uint8 or query.shape[-1] > 4096
    return False


class Emulator:
    """The library, its operators `vmemory_simt::*`, and what it found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cpu = {name: OPS[name].native for name in NAMES}
        for name, op in self.cpu.items():
            schema = str(op._schema)
            torch.library.define(f"vmemory_simt::{name}", schema[schema.index("(") :])
            torch.library.register_fake(f"vmemory_simt::{name}", op)
        torch.ops.load_library(str(path))
        # a library may hold one file's operators alone
        held = [n for n in NAMES if torch._C._dispatch_has_kernel_for_dispatch_key(f"vmemory_simt::{n}", "CPU")]
        self.calls = dict.fromkeys(held, 0)
        self._library = ctypes.CDLL(str(path))
        self._library.simt_configure.argtypes = [ctypes.c_uint64, *[ctypes.c_int] * 5]
        self._library.simt_reports.restype = ctypes.c_char_p
        self._library.simt_launches.restype = ctypes.c_long
        self._places: dict[str, str] = {}

    def configure(self, seed: int) -> None:
        """Another order of threads and blocks, another device."""
        draw = random.Random(seed)
        order, preempt = draw.choice([(0, 0), (1, 0), (2, 0), (2, 30), (2, 300)])
        side_by_side, processors = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3, 8])
        poison = draw.choice([0xFF, 0x7F, 0x00])
        self._library.simt_configure(draw.randrange(1 << 63), order, preempt, side_by_side, processors, poison)

    def install(self) -> None:
        """Let `impl="native"` on CPU tensors run the emulated kernels."""
        for name in self.calls:
            OPS[name].native = self._caller(name)

    def _caller(self, name: str) -> Any:
        emulated, cpu = getattr(torch.ops.vmemory_simt, name).default, self.cpu[name]

        def call(*args: Any) -> Any:
            if refused(name, args):
                return cpu(*args)
            self.calls[name] += 1
            return emulated(*args)

        return call

    @property
    def launches(self) -> int:
        return int(self._library.simt_launches())

    def reports(self) -> list[str]:
        """What was found since the last call, with source lines in the place of addresses."""
        text = self._library.simt_reports().decode()
        unknown = sorted(set(re.findall(r"@([0-9a-f]+)@", text)) - self._places.keys())
        if unknown:
            # an address of return: the call lies before it
            command = ["addr2line", "-i", "-s", "-a", "-e", str(self.path), *[hex(int(a, 16) - 1) for a in unknown]]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for address, part in zip(unknown, re.split(r"^0x[0-9a-f]+\n", told, flags=re.M)[1:], strict=True):
                lines = [line.split(" (")[0] for line in part.splitlines() if not line.startswith(("language.h", "??"))]
                self._places[address] = "at " + " < ".join(lines[:3])
        return [re.sub(r"@([0-9a-f]+)@", lambda m: self._places[m[1]], line) for line in text.splitlines()]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simt", type=Path, required=True, help="the library that `make simt` built")
    parser.addoption("--simt-seed", type=int, default=0, help="other orders of threads and blocks")


def pytest_configure(config: pytest.Config) -> None:
    emulator = Emulator(config.getoption("--simt").resolve())
    emulator.install()
    config.pluginmanager.register(Watch(emulator, config.getoption("--simt-seed")), "simt-watch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if LEFT_OUT.search(item.name) or item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    dropped = set(left_out)
    items[:] = [item for item in items if item not in dropped]


class Watch:
    """Configures the emulator for each test and fails the test for what it found."""

    def __init__(self, emulator: Emulator, seed: int) -> None:
        self.emulator, self.seed = emulator, seed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.emulator.configure(zlib.crc32(item.nodeid.encode()) + self.seed)
        try:
            return (yield)
        finally:
            found = self.emulator.reports()
            if found:
                pytest.fail("the emulated device reports\n  " + "\n  ".join(found[:20]), pytrace=False)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_sep("-", f"emulated: {self.emulator.launches} launches")
        calls = {name: calls for name, calls in self.emulator.calls.items() if calls}
        terminalreporter.write_line(", ".join(f"{name} {n}" for name, n in calls.items()))
