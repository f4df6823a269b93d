"""Builds the CUDA C++ kernels for the emulated device: `python -m tests.simt_build plain|checked`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(into: Path, *, checked: bool, csrc: Path = ROOT / "csrc", unit: str = "") -> Path:
    """The library in `into`, made anew where sources changed.

    Args:
        into: Folder of the build.
        checked: Whether every access of device code is checked; about three times slower.
        csrc: The sources.
        unit: The one file of `csrc/cuda` to build, without its suffix; all when empty.

    Raises:
        subprocess.CalledProcessError: The sources do not compile.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    torch = Path(spec.origin).parent
    define = {
        "CHECKED": "ON" if checked else "OFF",
        "UNITS": unit,
        "TORCH_INCLUDE": torch / "include",
        "TORCH_LIB": torch / "lib/libtorch_cpu.so",
    }
    # cmake and ninja of the environment that runs this
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (
        ["cmake", "--log-level=NOTICE", "-G", "Ninja", "-S", csrc / "simt", "-B", into]
        + [f"-D{name}={value}" for name, value in define.items()],
        ["cmake", "--build", into, "--parallel", os.environ.get("MAX_JOBS", "2")],
    ):
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(done.stdout[-4000:] + done.stderr[-4000:])
            done.check_returncode()
    return into / "libsimt.so"


if __name__ == "__main__":
    variant = sys.argv[1]
    print(build(ROOT / "build/simt" / variant, checked={"plain": False, "checked": True}[variant]))
