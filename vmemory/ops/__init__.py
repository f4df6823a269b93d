"""Public ops: validated, differentiable, compile-safe, with an implementation picked from device, dtype and shape."""

from vmemory.ops.grid_pool import grid_pool

__all__ = ["grid_pool"]
