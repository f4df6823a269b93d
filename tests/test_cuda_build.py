"""What nvcc made of the CUDA kernels, read from the built library: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import vmemory
from vmemory.ops._native import STATUS

LIBRARY = Path(vmemory.__file__).parent / "_ops_cuda.so"
SOURCES = sorted((Path(__file__).parent.parent / "csrc/cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and local bytes of every (architecture, kernel)."""
    nvidia = pytest.importorskip("triton.backends.nvidia")
    if not STATUS.facts.get("cuda"):
        pytest.skip("the CUDA kernels were not built")
    tool = Path(nvidia.__path__[0]) / "bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    found, arch, kernel = {}, "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found


def test_every_architecture_has_every_kernel(resources):
    kernels = {arch: {name for a, name in resources if a == arch} for arch, _ in resources}
    assert set(kernels) == {"sm_80", "sm_90"}
    assert kernels["sm_80"] == kernels["sm_90"]
    for source in SOURCES:
        (space,) = re.findall(r"^namespace vmemory::(\w+) {", source.read_text(), re.MULTILINE)
        assert any(f"{len(space)}{space}" in name for name in kernels["sm_80"]), source.name


def test_nothing_spills(resources):
    assert {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]} == {}


def test_registers_allow_a_full_block(resources):
    assert max(use["REG"] for use in resources.values()) <= 255
