"""Memory for streaming video models: fused kernels, bounded memory banks, drop-in integrations."""

from vmemory import banks, compress, ops
from vmemory.ops._select import explain

__version__ = "0.1.0"
__all__ = ["__version__", "banks", "compress", "explain", "ops"]
