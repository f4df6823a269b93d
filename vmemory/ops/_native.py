"""Load the compiled operators once, and record the reason if they cannot be loaded."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmemory import _cpu

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class NativeStatus:
    """The native libraries that can run in this process; a reason is empty if its library can run."""

    cpu: bool
    cuda: bool
    cpu_reason: str
    cuda_reason: str
    facts: dict[str, Any]
    level: str = ""
    """Level of the loaded CPU operators, for example x86-64-v3; empty if none are loaded."""
    level_reason: str = ""
    """The reason for this level."""


def _read_facts() -> dict[str, Any]:
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def built_levels() -> tuple[str, ...]:
    """Return the instruction-set levels whose library is in the package, lowest first."""
    return tuple(level for level in (_cpu.PORTABLE, *_cpu.LEVELS) if library(level).exists())


def library(level: str) -> Path:
    """Return the path of the CPU operators of a level, built or not."""
    return _PACKAGE / f"_ops.{level}.so"


def _choose(facts: dict[str, Any]) -> tuple[str, str]:
    """Return the level to load (empty for none) and the reason.

    Raises:
        RuntimeError: VMEMORY_CPU_ARCH names levels of which none was built and runs here.
    """
    forced = os.environ.get(_cpu.VARIABLE, "")
    runs, built = _cpu.machine_levels(), built_levels()
    able = [level for level in _cpu.wanted_levels("all") if level in built and level in runs]
    if able:
        others = f"built: {', '.join(built)}; this CPU runs {', '.join(runs)}"
        return able[-1], f"{_cpu.VARIABLE}={forced}" if forced else f"the best for this CPU ({others})"
    if not built:
        why = facts.get("reasons", {}).get("cpu") or "vmemory holds no _ops.*.so: install the package with pip"
    elif not runs:
        why = _cpu.why_no_level()
    else:
        why = f"_ops was built for {', '.join(built)}, this CPU runs {', '.join(runs)}"
    if forced not in ("", "all", "native"):
        raise RuntimeError(f"{_cpu.VARIABLE}={forced} cannot be had: {why}")
    return "", f"{why}: reinstall on this machine" if built and runs else why


def _driver() -> int:
    """Return the newest CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _why_no_cuda(facts: dict[str, Any]) -> str:
    """Return why the CUDA kernels cannot run, or an empty string; they need a driver at least as new as the toolkit."""
    if not facts.get("cuda"):
        return facts.get("reasons", {}).get("cuda") or "built without CUDA"
    if not torch.cuda.is_available():
        return "built, but torch sees no CUDA device"
    toolkit, driver = facts["cuda_toolkit"], _driver()
    major, minor = map(int, toolkit.split("."))
    # An older driver of the same major version runs compiled code but not PTX, which devices newer than the build
    # need. The device is not queried: this would initialise CUDA, and the process could not fork any more.
    if driver < 1000 * major + 10 * minor:
        shown = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the driver serves CUDA {shown}, the kernels were built with {toolkit}: update the driver, or rebuild"
    return ""


def _load() -> NativeStatus:
    facts = _read_facts()
    level, why_level = _choose(facts)
    if not level:
        cuda = facts.get("reasons", {}).get("cuda") or why_level
        return NativeStatus(False, False, why_level, cuda, facts)
    try:
        torch.ops.load_library(str(library(level)))
    except OSError as error:
        # an older torch lacks symbols of 2.11; `vmemory.info` must still be able to report this
        why = f"{library(level).name} did not load: {error}"
        return NativeStatus(False, False, why, why, facts)
    why_cuda = _why_no_cuda(facts)
    if not why_cuda:
        try:
            torch.ops.load_library(str(_PACKAGE / "_ops_cuda.so"))
        except OSError as error:
            why_cuda = f"_ops_cuda.so did not load: {error}"
    return NativeStatus(True, not why_cuda, "", why_cuda, facts, level, why_level)


STATUS = _load()
