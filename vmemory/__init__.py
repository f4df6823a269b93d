"""Memory for streaming video models: fused kernels, bounded memory banks, drop-in integrations."""

import importlib
from typing import Any

from vmemory import banks, compress, ops
from vmemory._attach import attach, attached, compress_inputs
from vmemory.models.registry import register_adapter
from vmemory.ops._select import explain

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # what reads video comes with an extra, and only when it is asked for
    if name in ("session", "sources", "search", "kv"):
        return importlib.import_module(f"vmemory.{name}")
    if name == "VideoSession":
        return importlib.import_module("vmemory.session").VideoSession
    raise AttributeError(f"module 'vmemory' has no attribute {name!r}")


__all__ = [
    "VideoSession",
    "__version__",
    "attach",
    "attached",
    "banks",
    "compress",
    "compress_inputs",
    "explain",
    "ops",
    "register_adapter",
]
