"""Build the native libraries with CMake.

Neither torch nor vmemory is imported: torch's headers are found on disk, so `pip install .` works with build
isolation. Libraries that cannot be built are left out, and `python -m vmemory.info` shows the reason. CPU operators,
one library per level of the instruction set, need a C++ compiler and torch. CUDA operators also need nvcc. `_host`
needs a compiler only.

Environment:
    VMEMORY_NATIVE: 0 skips the native part; 1 fails where it cannot be built, as an editable install does.
    VMEMORY_CPU_ARCH: `all`, `native` (this machine's), or x86-64-v2, x86-64-v3 and x86-64-v4 with semicolons between
        them; by default a wheel holds all, and a checkout this machine's.
    VMEMORY_CUDA: 0 skips the CUDA part; 1 fails where it cannot be built; by default it is built for a CUDA torch on
        a machine with a CUDA device.
    VMEMORY_CUDA_ARCHS: CUDA architectures, as CMake names them.
    CXX, CUDACXX, MAX_JOBS: the compilers, and how many run at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "80-real;90-real;90-virtual"
NATIVE = os.environ.get("VMEMORY_NATIVE", "auto")
CUDA = os.environ.get("VMEMORY_CUDA", "auto")
CPU = runpy.run_path(str(ROOT / "vmemory/_cpu.py"))
NO_TORCH = (
    "torch 2.11 or newer was not installed when vmemory was built: with torch in place run "
    "`pip install --force-reinstall --no-deps --no-cache-dir` with what vmemory was installed from"
)
NO_HEADERS = "Python's development headers or pybind11 were missing at build time"

# features that csrc/ needs of a compiler: C++20, vectors with selection by lane, shared libraries
PROBE = """
#include <concepts>
#include <vector>
typedef float lanes __attribute__((vector_size(32)));
template <std::floating_point A> A twice(A x) { return x + x; }
extern "C" float probe(lanes a, lanes b) {
  const lanes larger = a > b ? a : b;
  return std::vector<float>{twice(larger[0])}.front();
}
"""


@dataclass
class Plan:
    """The targets of this build, and the reasons for missing ones; written to _build.json."""

    cpu: bool = False
    cuda: bool = False
    host: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    levels: list[str] = field(default_factory=list)
    cxx: str = ""
    compiler: str = ""
    cuda_archs: str = ""
    cuda_toolkit: str = ""
    nvcc: str = ""
    torch: str = ""
    commit: str = ""
    python: str = platform.python_version()

    def targets(self) -> list[str]:
        """Return CMake's names of the planned targets."""
        cpu = [f"_ops.{level}" for level in self.levels if self.cpu]
        return cpu + ["_ops_cuda"] * self.cuda + ["_host"] * self.host

    def leave_out(self, reason: str, *parts: str) -> None:
        for part in parts:
            setattr(self, part, False)
            self.reasons.setdefault(part, reason)

    def strike(self, target: str, reason: str) -> None:
        """Remove one target; the CPU part stays as long as one of its levels does."""
        kind, _, level = target.partition(".")
        if level:
            self.levels.remove(level)
        if not level or not self.levels:
            self.leave_out(reason, {"_ops": "cpu", "_ops_cuda": "cuda", "_host": "host"}[kind])


def find_torch() -> Path | None:
    """Return torch's folder in the target environment, with or without build isolation."""
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(key)) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    return None


def torch_fact(folder: Path, name: str) -> str:
    """Return a value of torch/version.py; empty for None."""
    found = re.search(rf"^{name}\b[^=]*= *['\"](.*)['\"]", (folder / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else ""


def cuda_devices() -> int:
    """Count the CUDA devices that a process sees, as torch would, by asking the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def run(*command: str) -> str:
    """Run and print a command; return its first error, or an empty string."""
    error = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            if not error and re.search(r"\berror\b", line, re.IGNORECASE):
                error = line.strip()
    return (error or f"{Path(command[0]).name} ended with {child.returncode}") if child.returncode else ""


def why_not(compiler: list[str]) -> str:
    """Return why the compiler cannot build csrc/, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(PROBE)
        flags = ["-std=c++20", "-Wno-psabi", "-fPIC", "-shared", "-o", str(library), str(source)]
        if CPU["machine_levels"]() != (CPU["PORTABLE"],):
            flags.append("-march=x86-64-v4")
        try:
            done = subprocess.run([*compiler, *flags], capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C++ compiler {compiler[0]} does not start: {error.strerror}"
        if done.returncode == 0 and library.exists():
            return ""
    said = done.stderr.replace(f"{folder}/", "").strip().splitlines()
    error = next((line for line in said if "error" in line), said[-1] if said else f"exit status {done.returncode}")
    return f"the C++ compiler {compiler[0]} fails to make a small library: {error}"


def make_plan() -> Plan:
    plan = Plan()
    if (ROOT / ".git").exists():
        plan.commit = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD").strip()
    if NATIVE == "0":
        plan.leave_out("VMEMORY_NATIVE=0 at build time", "cpu", "cuda", "host")
        return plan
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    why = why_not(shlex.split(compiler)) if compiler else "no C++ compiler at build time"
    if not why and not shutil.which("cmake"):
        why = "no cmake at build time"
    if why or not compiler:
        plan.leave_out(why, "cpu", "cuda", "host")
        return plan
    plan.host, plan.cxx = True, compiler
    plan.compiler = next(iter(output(*shlex.split(compiler), "--version").splitlines()), "")
    torch = find_torch()
    if torch is None:
        plan.leave_out(NO_TORCH, "cpu", "cuda")
        return plan
    plan.cpu, plan.torch = True, torch_fact(torch, "__version__")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if CUDA == "0":
        plan.leave_out("VMEMORY_CUDA=0 at build time", "cuda")
    elif CUDA != "1" and not torch_fact(torch, "cuda"):
        plan.leave_out(f"torch {plan.torch} is a build without CUDA; VMEMORY_CUDA=1 builds it all the same", "cuda")
    elif CUDA != "1" and not cuda_devices():
        plan.leave_out("no CUDA device at build time; VMEMORY_CUDA=1 builds it all the same", "cuda")
    elif not nvcc:
        plan.leave_out("no nvcc at build time", "cuda")
    else:
        # without a version no driver is required; such a compiler fails in CMake
        release = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
        plan.cuda, plan.nvcc, plan.cuda_toolkit = True, nvcc, release[1] if release else "0.0"
        plan.cuda_archs = os.environ.get("VMEMORY_CUDA_ARCHS", CUDA_ARCHS)
    return plan


def jobs() -> str:
    # a CUDA translation unit can take 2 GB; swapping is slower than waiting
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (2 << 30)
    return os.environ.get("MAX_JOBS") or str(max(1, min(os.cpu_count() or 1, memory)))


class CMakeBuild(build_ext):
    """Run CMake once for all libraries, and copy them into the package with _build.json, which describes them."""

    def finalize_options(self) -> None:
        given = self.build_temp
        super().finalize_options()
        # setuptools sets `inplace` for editable installs too, and would build them in a folder that it removes
        if self.inplace and not given:
            self.build_temp = str(ROOT / "build/native")

    def run(self) -> None:
        plan = make_plan()
        if plan.cpu:
            plan.levels = list(CPU["wanted_levels"]("native" if self.inplace else "all"))
        if plan.cpu and not plan.levels:
            plan.leave_out(CPU["why_no_level"](), "cpu", "cuda")
        package = ROOT / "vmemory" if self.inplace else Path(self.build_lib) / "vmemory"
        package.mkdir(parents=True, exist_ok=True)
        made = self.build(plan, package) if plan.host else []
        for part, wanted in (("cpu", NATIVE), ("host", NATIVE), ("cuda", CUDA)):
            if wanted == "1" and not getattr(plan, part):
                raise SystemExit(f"vmemory: {part} was asked for and is not built: {plan.reasons[part]}")
        for old in set(package.glob("_ops*.so")) - set(made):
            old.unlink()
        facts = package / "_build.json"
        facts.write_text(json.dumps(asdict(plan), indent=1) + "\n")
        self.made = [str(path) for path in (*made, facts)]

    def get_outputs(self) -> list[str]:
        return self.made

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def build(self, plan: Plan, package: Path) -> list[Path]:
        """Build the plan and copy it into the package; strike targets that fail from the plan, with the reason."""
        folder = Path(self.build_temp).resolve() / "cmake"
        why = configure(plan, folder, fresh=not self.inplace)
        if why and plan.cuda and CUDA != "1":
            plan.leave_out(why, "cuda")
            why = configure(plan, folder, fresh=True)
        compile_all = ["cmake", "--build", str(folder), "--parallel", jobs()]
        failed = {}
        if not why and run(*compile_all):
            failed = {name: said for name in plan.targets() if (said := run(*compile_all, "--target", name))}
        if self.inplace and (why or failed):
            # an editable install is for work on the sources, where a failure must be seen
            raise SystemExit(f"vmemory: {why or failed}")
        made = []
        for name in plan.targets():
            library = next(folder.glob(f"{name}.*so"), None)
            if not (why or name in failed) and library:
                # renamed into place, because overwriting a library that is in use crashes the process
                fresh = package / f"{library.name}.new"
                shutil.copy2(library, fresh)
                made.append(fresh.replace(package / library.name))
            else:
                plan.strike(name, why or failed.get(name, NO_HEADERS))
        return made


def configure(plan: Plan, folder: Path, fresh: bool) -> str:
    """Configure with CMake; return why it failed, or an empty string."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = ", ".join(f'{{"{key}", R"({value})"}}' for key, value in asdict(plan).items() if isinstance(value, str))
    (folder / "facts.inc").write_text(facts + "\n")
    torch, ninja = find_torch(), shutil.which("ninja")
    define = {
        "CMAKE_BUILD_TYPE": os.environ.get("VMEMORY_BUILD_TYPE", "Release"),
        "CMAKE_CXX_COMPILER": ";".join(shlex.split(plan.cxx)),
        "Python_EXECUTABLE": sys.executable,
        "VMEMORY_FACTS_DIR": folder,
        "VMEMORY_CPU_LEVELS": ";".join(plan.levels),
        "VMEMORY_CUDA": "ON" if plan.cuda else "OFF",
        "VMEMORY_CUDA_ARCHS": plan.cuda_archs or CUDA_ARCHS,
        "TORCH_INCLUDE": torch / "include" if torch else "",
        "TORCH_LIB": torch / "lib/libtorch_cpu.so" if torch else "",
    }
    if find_spec("pybind11"):
        define["pybind11_DIR"] = import_module("pybind11").get_cmake_dir()
    if ninja:
        # an isolated build has its own ninja, which is removed after the build
        define["CMAKE_MAKE_PROGRAM"] = ninja
    flags = [*(["--fresh"] if fresh else []), *(["-G", "Ninja"] if ninja else [])]
    flags += [f"-D{key}={value}" for key, value in define.items()]
    return run("cmake", "--log-level=NOTICE", "-S", str(ROOT), "-B", str(folder), *flags)


# CMake builds the libraries; the named extension tells setuptools that the wheel has native code
setup(ext_modules=[Extension("vmemory._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
