"""Report which backends were built and loaded, and why others are missing: `python -m vmemory.info [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any


def collect() -> dict[str, Any]:
    """Return versions, and for each backend whether it was built and loaded, with the reason if not."""
    import torch

    from vmemory import __version__
    from vmemory._cpu import machine_levels
    from vmemory.ops._native import STATUS, built_levels

    facts = STATUS.facts
    reasons = facts.get("reasons", {})
    try:
        _host = import_module("vmemory._host")
    except ImportError as error:
        host = {"built": bool(facts.get("host")), "loaded": False, "reason": reasons.get("host") or str(error)}
    else:
        host = {"built": True, "loaded": True, "reason": "", "facts": _host.build_info()}
    triton = metadata.version("triton") if find_spec("triton") else None
    cuda_device = torch.cuda.is_available()
    triton_reason = "" if triton else "triton is not installed"
    if triton and not cuda_device:
        triton_reason = "torch sees no CUDA device"
    return {
        "vmemory": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_levels": list(machine_levels()),
        "device": torch.cuda.get_device_name() if cuda_device else None,
        "build": {k: v for k, v in facts.items() if k != "reasons"},
        "backends": {
            "cpu": {
                "built": bool(built_levels()),
                "loaded": STATUS.cpu,
                "reason": STATUS.cpu_reason,
                "levels": list(built_levels()),
                "level": STATUS.level,
                "level_reason": STATUS.level_reason,
            },
            "cuda": {"built": bool(facts.get("cuda")), "loaded": STATUS.cuda, "reason": STATUS.cuda_reason},
            "triton": {"built": True, "loaded": not triton_reason, "reason": triton_reason},
            "host": host,
        },
    }


def in_words(state: dict[str, Any]) -> str:
    """Return a backend's state as one line."""
    words = "loaded" if state["loaded"] else ("built, not loaded" if state["built"] else "not built")
    why = state["reason"] or (f"{state['level']}, {state['level_reason']}" if state.get("level") else "")
    return f"{words}: {why}" if why else words


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vmemory.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print machine-readable facts")
    report = collect()
    if parser.parse_args().json:
        print(json.dumps(report, indent=1))
        return
    versions = (f"{name} {report[name]}" for name in ("vmemory", "python", "torch", "triton") if report[name])
    print(", ".join(versions))
    levels = ", ".join(report["cpu_levels"]) or "below x86-64-v2"
    print(f"CPU {levels}; device {report['device'] or 'none'}")
    for name, state in report["backends"].items():
        print(f"  {name:<7}{in_words(state)}")
    build = report["build"]
    if build.get("compiler"):
        extra = f", CUDA for {build['cuda_archs']} by {build['nvcc']}" if build.get("cuda") else ""
        print(f"built for {', '.join(build['levels']) or 'no CPU level'} by {build['compiler']}{extra}")


if __name__ == "__main__":
    main()
