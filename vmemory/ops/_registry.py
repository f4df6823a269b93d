"""Define operators: schema, fake kernel, and the Triton kernel in a namespace of its own.

The op `vmemory::<name>` exists whether or not the native library was built; its CPU and CUDA kernels come from
`_ops.so`. The Triton launcher is registered as `vmemory_triton::<name>`, because a dispatch key holds one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

OPS: dict[str, Op] = {}
"""All defined operators, forward and backward, by name."""


class Op:
    """An operator; `op("native", ...)` or `op("triton", ...)` runs one of its registered kernels."""

    __slots__ = ("name", "native", "stem", "triton")

    def __init__(
        self, name: str, schema: str, fake: Callable[..., Any], triton: bool = True, stem: str | None = None
    ) -> None:
        # the file in kernels/ that holds the launcher
        self.name, self.stem = name, stem or name.removesuffix("_backward")
        OPS[name] = self
        self.native = self._define("vmemory", schema, fake)
        self.triton: Any = None
        if triton:
            self.triton = self._define("vmemory_triton", schema, fake)
            torch.library.impl(f"vmemory_triton::{name}", "CUDA", self._launch)

    def _define(self, namespace: str, schema: str, fake: Callable[..., Any]) -> Any:
        torch.library.define(f"{namespace}::{self.name}", schema)
        torch.library.register_fake(f"{namespace}::{self.name}", fake)
        return getattr(getattr(torch.ops, namespace), self.name).default

    def _launch(self, *args: Any) -> Any:
        # imported at the first launch, because `import vmemory` must not need triton
        return getattr(import_module(f"vmemory.kernels.{self.stem}"), self.name)(*args)

    def __call__(self, impl: str, *args: Any) -> Any:
        return (self.native if impl == "native" else self.triton)(*args)
