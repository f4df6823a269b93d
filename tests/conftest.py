"""Fixtures of all tests. Triton kernels run without a GPU: `triton(module, launcher, *args)` compiles for sm_80 what a
launcher launches on CPU tensors, and runs it here. It skips where triton is missing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.children import end_with_this_process, running
from tests.matrix import MatrixTable
from tests.pairwise import without_new_pairs
from vmemory.ops._native import STATUS
from vmemory.testing import end_with_parent, poisoned, triton_on_cpu

# files whose tests run the compiled operators: once at each level of the instruction set. Memories stand for all that
# is written in Python above them.
LEVEL_FILES = (
    "adjacent", "attention", "bank_", "banks.", "bipartite", "determinism", "dual_memory.", "gated", "golden",
    "grid", "memory_attention", "native", "quantize", "raw", "ring", "select", "similarity", "token",
)  # fmt: skip
# what no level changes: the fixtures of their tests of other backends, and the names of tests of torch's own compiler
OTHER_BACKENDS = {"triton", "triton_compiler", "resources"}
COMPILER = re.compile("compile|one_graph|opcheck|inductor")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole product of parameters, not a part with every pair")
    parser.addoption("--matrix", action="store_true", help="every model family with every policy, not a part of them")
    parser.addoption("--distribution", action="store_true", help="build and install distributions, with network")
    parser.addoption("--matrix-table", type=Path, help="with --matrix: write there, as Markdown, what passed")


def pytest_configure(config: pytest.Config) -> None:
    end_with_this_process()
    if hasattr(config, "workerinput"):
        end_with_parent(os.getppid())
    path = config.getoption("--matrix-table")
    if path is None or hasattr(config, "workerinput"):
        return
    if not config.getoption("--matrix"):
        raise pytest.UsageError("--matrix-table: expected --matrix with it, since a part makes no table")
    config.pluginmanager.register(MatrixTable(path))


def pytest_report_header(config: pytest.Config) -> list[str]:
    told = [] if torch.cuda.is_available() else ["torch sees no CUDA device: tests marked gpu are left out"]
    return told if config.getoption("--all") else [*told, "each test on a part of its parameters; --all: on all"]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for option in ("matrix", "distribution"):
        if not config.getoption(f"--{option}"):
            leave_out(config, items, {item for item in items if item.get_closest_marker(option)})
    for item in items:
        of_level = item.path.name.removeprefix("test_").startswith(LEVEL_FILES)
        other = OTHER_BACKENDS.intersection(item.fixturenames) or COMPILER.search(item.name)
        if of_level and not other and not item.get_closest_marker("gpu"):
            item.add_marker("level")
    # here `-m` and `-k` choose; the case that they name runs whether or not it would be among the pairs
    yield
    no_device = not torch.cuda.is_available()
    leave_out(config, items, {item for item in items if no_device and item.get_closest_marker("gpu")})
    if not config.getoption("--all"):
        leave_out(config, items, {item for item in items if item.get_closest_marker("slow")})
        leave_out(config, items, without_new_pairs(items))


def leave_out(config: pytest.Config, items: list[pytest.Item], those: set[pytest.Item]) -> None:
    if those:
        config.hook.pytest_deselected(items=[item for item in items if item in those])
        items[:] = [item for item in items if item not in those]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A kernel that broke the device's context would make all that follows in this process fail in its place."""
    done = yield
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if hasattr(item.config, "workerinput"):
                # xdist tells which test it was and goes on with another worker
                os._exit(3)
            item.session.shouldfail = f"{item.nodeid} left the CUDA context unusable: {error}"
    return done


@pytest.fixture(autouse=True, scope="module")
def no_child_is_left() -> Iterator[None]:
    """What a file's tests start ends with them; a child that is just ending has a moment."""
    yield
    deadline = time.monotonic() + 2
    while (left := list(running())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.fixture(scope="session")
def triton() -> Callable[..., Any]:
    """Launch `launcher(*args)` of a module of kernels as compiled code on the CPU, with NaN in outputs before that."""
    pytest.importorskip("triton", reason="triton is not installed")

    def launch(module: str, launcher: str, *args: Any, **kwargs: Any) -> Any:
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        with poisoned(), triton_on_cpu():
            return getattr(import_module(module), launcher)(*plain, **kwargs)

    return launch


@pytest.fixture(scope="session")
def triton_compiler() -> None:
    """Skips where kernels cannot be compiled ahead of time."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.fixture(scope="session")
def native() -> None:
    """Skips where the compiled CPU ops are missing, with the reason `vmemory.info` gives."""
    if not STATUS.cpu:
        pytest.skip(STATUS.cpu_reason)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models spend more on waking threads than on work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
