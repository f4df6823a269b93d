"""An array that grows in place."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


class Growing:
    """An array whose first axis grows without a copy: pages that lie elsewhere are mapped anew.

    Args:
        dtype: Of the values.
        row: Shape of one row.

    Attributes:
        array: The whole room `[capacity, *row]`; rows never written are 0. The next `reserve` may move it, so nobody
            keeps a view of it beyond one call.
    """

    def __init__(self, dtype: Any, row: tuple[int, ...] = ()) -> None:
        self._dtype, self._row = np.dtype(dtype), row
        self._bytes = self._dtype.itemsize * int(np.prod(row, dtype=np.int64))
        self._map = _pages(mmap.PAGESIZE)
        self.array = self._view()

    def reserve(self, rows: int) -> None:
        """Make room for this many rows."""
        if rows <= len(self.array):
            return
        size = max(rows, len(self.array) * 3 // 2) * self._bytes
        size += -size % mmap.PAGESIZE
        del self.array
        try:
            self._map.resize(size)
        except BufferError:
            # a traceback that somebody keeps still holds a view
            old, self._map = self._map, _pages(size)
            self._map[: len(old)] = old
        self.array = self._view()

    def _view(self) -> np.ndarray:
        rows = len(self._map) // self._bytes
        whole = np.frombuffer(self._map, self._dtype, count=rows * self._bytes // self._dtype.itemsize)
        return whole.reshape(rows, *self._row)


def _pages(size: int) -> mmap.mmap:
    # a shared mapping could not be used beyond its first size
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
