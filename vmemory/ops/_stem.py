"""Operators that share a Triton file with another operator."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vmemory.ops._registry import Op


class StemOp(Op):
    """An `Op` with an explicit file stem, because e.g. `select_tokens` and `compact` share one kernel file."""

    __slots__ = ("stem",)

    def __init__(self, stem: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
        self.stem = stem
        super().__init__(name, schema, fake)

    def _launch(self, *args: Any) -> Any:
        return getattr(import_module(f"vmemory.kernels.{self.stem}"), self.name)(*args)
