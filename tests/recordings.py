"""Recordings of the originals: what they were given, what they decided and returned.

A folder holds a folder for each policy, and in it a case is `NAME.json` (facts) with or without `NAME.safetensors`.
A policy's check is `tests/golden_cases/POLICY.py` with a function `check(case)`; both are found by their files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file
from torch import Tensor

from vmemory.ops._native import STATUS

CHECKS = Path(__file__).parent / "golden_cases"


def folder() -> Path:
    """Where the recordings are: the environment variable `VMEMORY_GOLDEN`, else those of the repository."""
    named = os.environ.get("VMEMORY_GOLDEN")
    if named and not Path(named).is_dir():
        raise pytest.UsageError(f"VMEMORY_GOLDEN: expected a folder, got {named!r}")
    return Path(named) if named else Path(__file__).parent / "golden"


class Case:
    """One recording; files are read when they are first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the JSON file says; `parameters` and `decisions`, where it has them, on the same level."""
        file = self.path.with_name(f"{self.path.name}.json")
        facts = json.loads(file.read_text()) if file.exists() else {}
        return facts | facts.get("parameters", {}) | facts.get("decisions", {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        file = self.path.with_name(f"{self.path.name}.safetensors")
        return load_file(file) if file.exists() else {}

    def holds(self, *names: str) -> bool:
        """Whether it has tensors of all these names."""
        return self.tensors.keys() >= set(names)

    def skip(self, why: str = "no check for what it holds") -> NoReturn:
        pytest.skip(f"{self}: {why}")


def cases(folder: Path) -> list[Case]:
    """The cases of a policy's folder by name; none where it is missing."""
    names = {file.stem for file in folder.glob("*") if file.suffix in (".json", ".safetensors")}
    return [Case(folder / name) for name in sorted(names)]


def policies(folder: Path) -> Iterator[tuple[str, list[Case], bool]]:
    """Each policy that has recordings or a check: its name, its cases, and whether it has a check."""
    checked = {file.stem for file in CHECKS.glob("*.py")}
    recorded = {path.name for path in folder.iterdir() if path.is_dir()}
    for policy in sorted(checked | recorded):
        yield policy, cases(folder / policy), policy in checked


def implementations() -> tuple[str, ...]:
    """Of operators on the CPU, as `impl` names them."""
    return ("native", "reference") if STATUS.cpu else ("reference",)
