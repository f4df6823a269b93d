"""Memory for streaming video models: fused kernels, bounded memory banks, drop-in integrations."""

from vmemory import banks, compress, ops
from vmemory.attach import attach, attached, compress_inputs
from vmemory.models.adapter import register_adapter
from vmemory.ops._select import explain

__version__ = "0.1.0"
__all__ = [
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
