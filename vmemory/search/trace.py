"""Record evenly spaced rows of an endless stream, up to a limit."""

from __future__ import annotations

import numpy as np


class Trace:
    """Rows of numbers, one per frame; at the limit every second row is dropped, and the stride doubles.

    Args:
        columns: Numbers per row.
        limit: Largest number of rows, at least 2.
    """

    def __init__(self, columns: int, limit: int = 65536) -> None:
        if limit < 2:
            raise ValueError(f"limit: expected at least 2, got {limit}")
        self.limit = limit
        self.seen = 0
        self.stride = 1
        self._rows: list[tuple[float, ...]] = []
        self._columns = columns

    def append(self, *row: float) -> None:
        if len(row) != self._columns:
            raise ValueError(f"row: expected {self._columns} numbers, got {len(row)}")
        if self.seen % self.stride == 0:
            if len(self._rows) == self.limit:
                self._rows = self._rows[::2]
                self.stride *= 2
            if self.seen % self.stride == 0:
                self._rows.append(row)
        self.seen += 1

    @property
    def rows(self) -> np.ndarray:
        """Return the rows `[n, columns]` float64, oldest first."""
        return np.array(self._rows, dtype=np.float64).reshape(-1, self._columns)

    def restore(self, rows: np.ndarray, seen: int, stride: int) -> None:
        """Continue from the rows of another trace."""
        self._rows = [tuple(row) for row in rows.tolist()]
        self.seen, self.stride = seen, stride
