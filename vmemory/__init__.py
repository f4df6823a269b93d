"""Memory for streaming video models: fused kernels, bounded memory banks, drop-in integrations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmemory import banks, compress, graph, kv, ops, search, session, sources
    from vmemory._attach import MemoryHandle, attach, attached, compress_inputs
    from vmemory.banks import MemoryConfig
    from vmemory.graph import MemoryGraph
    from vmemory.kv import KVMemory
    from vmemory.models.registry import register_adapter
    from vmemory.ops._select import explain
    from vmemory.session import SessionPool, VideoSession
    from vmemory.sources import FrameSource, LiveSource

__version__ = "0.1.0"

# imported on first use, because torch takes seconds and video readers need an extra
_ROOMS = ("banks", "compress", "eval", "graph", "kv", "ops", "search", "session", "sources")
_NAMES = {
    "FrameSource": "sources",
    "KVMemory": "kv",
    "LiveSource": "sources",
    "MemoryConfig": "banks",
    "MemoryGraph": "graph",
    "MemoryHandle": "_attach",
    "SessionPool": "session",
    "VideoSession": "session",
    "attach": "_attach",
    "attached": "_attach",
    "compress_inputs": "_attach",
    "explain": "ops._select",
    "register_adapter": "models.registry",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"vmemory.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'vmemory' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"vmemory.{_NAMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


__all__ = [
    "FrameSource",
    "KVMemory",
    "LiveSource",
    "MemoryConfig",
    "MemoryGraph",
    "MemoryHandle",
    "SessionPool",
    "VideoSession",
    "__version__",
    "attach",
    "attached",
    "banks",
    "compress",
    "compress_inputs",
    "explain",
    "graph",
    "kv",
    "ops",
    "register_adapter",
    "search",
    "session",
    "sources",
]
