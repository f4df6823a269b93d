"""Build the native libraries with CMake.

Neither torch nor vmemory is imported: torch's headers are found on disk, so `pip install .` works with build
isolation. Four outcomes, all of them successful and told by `python -m vmemory.info`: no compiler or no torch
(pure Python), a C++ compiler (CPU ops), nvcc as well (CPU and CUDA ops).

Environment: VMEMORY_NATIVE=0 skips the native part; VMEMORY_CUDA=auto|0|1 (1 fails without nvcc);
VMEMORY_CUDA_ARCHS overrides the CUDA architectures; VMEMORY_CPU_ARCH overrides -march; MAX_JOBS the build's width.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "80-real;90-real;90-virtual"


@dataclass
class Plan:
    """What this build will make, and why not more."""

    cpu: bool = False
    cuda: bool = False
    host: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    cpu_arch: str = ""
    cuda_archs: str = ""
    compiler: str = ""
    nvcc: str = ""
    torch: str = ""
    commit: str = ""
    python: str = platform.python_version()


def find_torch() -> Path | None:
    """torch's folder in the environment that the package is installed into, build isolation or not."""
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(key)) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    return None


def torch_version(folder: Path) -> str:
    for line in (folder / "version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split("=", 1)[1].strip().strip("'\"")
    return "unknown"


def first_line(command: list[str]) -> str:
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next(iter(out.splitlines()), "")


def host_arch() -> str:
    """The highest x86-64 level this machine runs: portable within the level, unlike -march=native."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split())
    except (OSError, IndexError):
        return ""
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "x86-64-v4"
    return "x86-64-v3" if {"avx2", "bmi2", "f16c", "fma"} <= flags else "x86-64-v2"


def make_plan() -> Plan:
    plan = Plan(commit=first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]))
    wanted = os.environ.get("VMEMORY_CUDA", "auto")
    if os.environ.get("VMEMORY_NATIVE", "1") == "0":
        plan.reasons = dict.fromkeys(("cpu", "cuda", "host"), "VMEMORY_NATIVE=0 at build time")
        return plan
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not compiler:
        plan.reasons = dict.fromkeys(("cpu", "cuda", "host"), "no C++ compiler at build time")
        return plan
    plan.compiler = first_line([compiler, "--version"])
    plan.host = True
    torch = find_torch()
    if torch is None:
        plan.reasons |= dict.fromkeys(("cpu", "cuda"), "torch 2.11 or newer was not installed at build time")
        return plan
    plan.cpu, plan.torch = True, torch_version(torch)
    plan.cpu_arch = os.environ.get("VMEMORY_CPU_ARCH", host_arch())
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wanted == "0":
        plan.reasons["cuda"] = "VMEMORY_CUDA=0 at build time"
    elif nvcc:
        plan.cuda, plan.nvcc = True, nvcc
        plan.cuda_archs = os.environ.get("VMEMORY_CUDA_ARCHS", CUDA_ARCHS)
    elif wanted == "1":
        raise SystemExit("VMEMORY_CUDA=1, but no nvcc was found on PATH or in CUDACXX")
    else:
        plan.reasons["cuda"] = "no nvcc at build time"
    return plan


PLAN = make_plan()


def jobs() -> str:
    # a CUDA translation unit can take 2 GB; swapping is slower than waiting
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 << 30)
    return os.environ.get("MAX_JOBS") or str(max(1, min(os.cpu_count() or 1, memory)))


class CMakeBuild(build_ext):
    """Run CMake once for both libraries."""

    def get_ext_filename(self, fullname: str) -> str:
        # a library of torch ops, not a Python module: no Python version in its name
        name = super().get_ext_filename(fullname)
        return str(Path(name).with_name("_ops.so")) if fullname.endswith("_ops") else name

    def run(self) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        facts = ", ".join(f'{{"{k}", R"({v})"}}' for k, v in asdict(PLAN).items() if isinstance(v, str))
        (build / "facts.inc").write_text(facts + "\n")
        torch = find_torch()
        define = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "VMEMORY_FACTS_DIR": build,
            "VMEMORY_CPU_ARCH": PLAN.cpu_arch,
            "VMEMORY_CUDA": "ON" if PLAN.cuda else "OFF",
            "VMEMORY_CUDA_ARCHS": PLAN.cuda_archs or CUDA_ARCHS,
            "TORCH_INCLUDE": torch / "include" if torch else "",
            "TORCH_LIB": torch / "lib/libtorch_cpu.so" if torch else "",
        }
        cmake = shutil.which("cmake") or "cmake"
        flags = [f"-D{key}={value}" for key, value in define.items()]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run([cmake, "--log-level=NOTICE", "-S", str(ROOT), "-B", str(build), *generator, *flags], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs()], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            stem = extension.name.rsplit(".", 1)[1]
            made = next(build.glob(f"{stem}.*so"), None) or next(build.glob(f"{stem}*.so"), None)
            if made is None:
                PLAN.host = PLAN.host and stem != "_host"
                PLAN.reasons[stem.strip("_")] = "Python's development headers were missing at build time"
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # renamed into place: overwriting a library that a running process has mapped would crash it
            fresh = target.with_suffix(".new")
            shutil.copy2(made, fresh)
            fresh.replace(target)


class WriteFacts(build_py):
    """Leave _build.json beside the package, so that info can tell what was built and why not more."""

    def run(self) -> None:
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        target = base / "vmemory/_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(asdict(PLAN), indent=1) + "\n")


EXTENSIONS = [
    Extension(f"vmemory.{name}", sources=[], optional=name == "_host")
    for name, wanted in (("_ops", PLAN.cpu), ("_host", PLAN.host))
    if wanted
]

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild, "build_py": WriteFacts})
