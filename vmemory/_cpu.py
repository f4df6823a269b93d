"""Levels of x86-64 instruction sets for the CPU operators. Imports no torch, because setup.py imports this file."""

from __future__ import annotations

import os
import platform
from pathlib import Path

PORTABLE = "portable"
"""The only level on a machine that is not x86-64: the compiler's default."""

# Linux's names of the features that each level adds (x86-64 psABI); Linux hides features that it does not support
LEVELS = {
    "x86-64-v2": {"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "x86-64-v3": {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v4": {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
}
VARIABLE = "VMEMORY_CPU_ARCH"


def machine_levels() -> tuple[str, ...]:
    """Return the levels that this machine supports, lowest first; empty below x86-64-v2."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return (PORTABLE,)
    flags = _flags()
    runs: list[str] = []
    for level, needs in LEVELS.items():
        if not needs <= flags:
            break
        runs.append(level)
    return tuple(runs)


def why_no_level() -> str:
    """Return which features this machine lacks for the lowest level."""
    lacks = LEVELS["x86-64-v2"] - _flags()
    return f"this CPU is below x86-64-v2: /proc/cpuinfo shows no {', '.join(sorted(lacks))}"


def wanted_levels(default: str) -> tuple[str, ...]:
    """Read VMEMORY_CPU_ARCH: the levels to build, and those to choose from when loading.

    Args:
        default: Value for an unset or empty variable.

    Returns:
        Levels, lowest first: all for `all`, this machine's highest for `native`, otherwise the levels named in the
        variable, separated by semicolons.

    Raises:
        ValueError: The variable names something else.
    """
    value = os.environ.get(VARIABLE) or default
    mine = machine_levels()
    known = mine if mine == (PORTABLE,) else tuple(LEVELS)
    if value == "all":
        return known
    if value == "native":
        return mine[-1:]
    named = [name.strip() for name in value.split(";")]
    strangers = [name for name in named if name not in known]
    if strangers:
        raise ValueError(
            f"{VARIABLE}: expected native, all or levels out of {', '.join(known)} with semicolons between them, "
            f"got {value!r}"
        )
    return tuple(level for level in known if level in named)


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    # the first core is enough: Linux shows only features that all cores have
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


if __name__ == "__main__":
    print(*machine_levels())
