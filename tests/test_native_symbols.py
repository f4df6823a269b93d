from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import vmemory

LIBRARIES = sorted(Path(vmemory.__file__).parent.glob("_ops*.so"))
# libtorch's stable C interface, and what every Linux with this glibc has
TORCH = re.compile(r"(aoti_torch|torch)_\w+$")
SYSTEM = re.compile(r"\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}

pytestmark = [
    pytest.mark.skipif(not LIBRARIES, reason="no vmemory/_ops*.so is built"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="nm of binutils is not installed"),
    pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name),
]


def undefined(library: Path) -> list[str]:
    out = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in out.stdout.splitlines()]


def test_every_undefined_symbol_is_stable(library):
    names = undefined(library)
    assert any(name.startswith("aoti_torch_") for name in names)
    strangers = [name for name in names if not (TORCH.match(name) or SYSTEM.match(name) or name in WEAK)]
    assert not strangers


def test_libraries_needed(library):
    if shutil.which("readelf") is None:
        pytest.skip("readelf of binutils is not installed")
    out = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", out))
    system = re.compile(r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|ld-linux-x86-64)\.so")
    # a CUDA torch and a CPU torch both have libtorch_cpu; anything more would tie the library to one of them
    assert {name for name in needed if not system.match(name)} == {"libtorch_cpu.so"}
