"""Public ops: validated, differentiable, compile-safe, with an implementation picked from device, dtype and shape."""

from vmemory.ops.adjacent_similarity import adjacent_similarity
from vmemory.ops.grid_pool import PooledGrid, grid_pool
from vmemory.ops.grid_pool_ragged import RaggedGrid, grid_pool_ragged
from vmemory.ops.select_tokens import Compacted, Selection, compact, select_tokens

__all__ = [
    "Compacted",
    "PooledGrid",
    "RaggedGrid",
    "Selection",
    "adjacent_similarity",
    "compact",
    "grid_pool",
    "grid_pool_ragged",
    "select_tokens",
]
