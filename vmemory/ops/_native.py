"""Loads the compiled operators once and remembers why not, if not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_NEEDS = {"x86-64-v4": ("AVX512",), "x86-64-v3": ("AVX2", "AVX512")}


@dataclass(frozen=True)
class NativeStatus:
    """What of the native library can run in this process; each reason is empty when its part can."""

    cpu: bool
    cuda: bool
    cpu_reason: str
    cuda_reason: str
    facts: dict[str, Any]


def _read_facts() -> dict[str, Any]:
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load() -> NativeStatus:
    facts = _read_facts()
    reasons = facts.get("reasons", {})
    library = _PACKAGE / "_ops.so"
    if not library.exists():
        why = reasons.get("cpu") or "vmemory/_ops.so does not exist: install the package with pip"
        return NativeStatus(False, False, why, reasons.get("cuda") or why, facts)
    needs = _NEEDS.get(facts.get("cpu_arch", ""), ())
    capability = torch.backends.cpu.get_cpu_capability()
    if needs and capability not in needs:
        why = f"_ops.so was built for {facts['cpu_arch']}, this CPU offers {capability}: reinstall on this machine"
        return NativeStatus(False, False, why, why, facts)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        # loading needs torch 2.11 or newer: an older one lacks symbols, and info has to be able to say so
        why = f"_ops.so did not load: {error}"
        return NativeStatus(False, False, why, why, facts)
    if not facts.get("cuda"):
        why = reasons.get("cuda", "built without CUDA")
        return NativeStatus(True, False, "", why, facts)
    if not torch.cuda.is_available():
        return NativeStatus(True, False, "", "built, but torch sees no CUDA device", facts)
    return NativeStatus(True, True, "", "", facts)


STATUS = _load()
