"""Memory that lanes share: bytes at addresses, with bounds, alignment and writers checked at every access."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from vmemory._ptx.program import PtxError
from vmemory._ptx.values import unsigned

__all__ = ["GlobalMemory", "SharedMemory"]


class _Region:
    """Bytes from `start` to `stop`, held in an array whose beginning is `base`, a multiple of 16 not above `start`."""

    def __init__(self, start: int, stop: int, base: int, held: Any) -> None:
        self.start, self.stop, self.base, self.held = start, stop, base, held
        # program that wrote a byte, -1 where none did; there from the first write on
        self.writer: Any = None

    def cells(self, size: int) -> Any:
        """Return the bytes as rows of `size` bytes."""
        return self.held.view(unsigned(min(size, 8))).reshape(-1, max(1, size // 8))

    def load(self, addresses: Any, size: int) -> Any:
        return self.cells(size)[(addresses - self.base) // size]

    def store(self, addresses: Any, rows: Any, size: int) -> None:
        places, cells = (addresses - self.base) // size, self.cells(size)
        cells[places] = rows
        if (cells[places] != rows).any():
            raise PtxError("lanes write different values to one place at once")

    def meet(self, addresses: Any, size: int, programs: Any, write: bool) -> None:
        """Refuse what another program wrote in this launch: which of them is first nobody knows."""
        if self.writer is None:
            if not write:
                return
            self.writer = np.full(len(self.held), -1, np.int32)
        writers, places = self.writer.reshape(-1, size), (addresses - self.base) // size
        found = writers[places]
        if ((found >= 0) & (found != programs[:, None])).any():
            raise PtxError(f"a program {'writes' if write else 'reads'} what another wrote in this launch")
        if write:
            writers[places] = programs[:, None]
            if (writers[places] != programs[:, None]).any():
                raise PtxError("two programs write one place in this launch")


def _check_alignment(addresses: Any, size: int) -> None:
    if (addresses % size).any():
        raise PtxError(f"an address is not a multiple of {size} bytes")


class GlobalMemory:
    """The tensors of a launch, where they lie.

    A launch may touch what one of its tensors spans and nothing else. What a program wrote, no other program of the
    launch may read or write, except by atomic operations.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans: list[list[int]] = []
        for start, stop in sorted(_span(x) for x in tensors if x.numel()):
            if spans and start < spans[-1][1]:
                # views of one tensor
                spans[-1][1] = max(spans[-1][1], stop)
            else:
                spans.append([start, stop])
        self.regions = [_region(start, stop) for start, stop in spans]

    def load(self, addresses: Any, size: int, programs: Any) -> Any:
        """Load `size` bytes at each of [n] addresses: [n, size / 8] numbers of 8 bytes, or [n, 1] of `size`."""
        _check_alignment(addresses, size)
        out = np.empty((len(addresses), max(1, size // 8)), unsigned(min(size, 8)))
        for region, lanes in self._found(addresses, size):
            region.meet(addresses[lanes], size, programs[lanes], False)
            out[lanes] = region.load(addresses[lanes], size)
        return out

    def store(self, addresses: Any, rows: Any, size: int, programs: Any) -> None:
        _check_alignment(addresses, size)
        for region, lanes in self._found(addresses, size):
            region.meet(addresses[lanes], size, programs[lanes], True)
            region.store(addresses[lanes], rows[lanes], size)

    def combine(self, function: Any, addresses: Any, values: Any, programs: Any) -> None:
        """Update memory atomically with every lane's value."""
        _check_alignment(addresses, values.dtype.itemsize)
        for region, lanes in self._found(addresses, values.dtype.itemsize):
            cells = region.held.view(values.dtype)
            function.at(cells, (addresses[lanes] - region.base) // cells.itemsize, values[lanes])

    def _found(self, addresses: Any, size: int) -> Iterable[tuple[_Region, Any]]:
        left = np.ones(len(addresses), bool)
        for region in self.regions:
            inside = left & (addresses >= region.start) & (addresses + size <= region.stop)
            if inside.any():
                yield region, inside
                left &= ~inside
        if left.any():
            raise PtxError(f"{left.sum()} lanes are outside of every tensor of the launch")


class SharedMemory:
    """`size` bytes for each program, all ones at first: NaN as a float."""

    def __init__(self, programs: int, size: int) -> None:
        self.size, self.pitch = size, -(-max(size, 16) // 16) * 16
        self.region = _Region(0, 0, 0, np.full(programs * self.pitch, 0xFF, np.uint8))

    def load(self, addresses: Any, size: int, programs: Any) -> Any:
        return self.region.load(self._places(addresses, size, programs), size)

    def store(self, addresses: Any, rows: Any, size: int, programs: Any) -> None:
        self.region.store(self._places(addresses, size, programs), rows, size)

    def combine(self, function: Any, addresses: Any, values: Any, programs: Any) -> None:
        places = self._places(addresses, values.dtype.itemsize, programs) // values.dtype.itemsize
        function.at(self.region.held.view(values.dtype), places, values)

    def _places(self, addresses: Any, size: int, programs: Any) -> Any:
        _check_alignment(addresses, size)
        outside = (addresses < 0) | (addresses + size > self.size)
        if outside.any():
            raise PtxError(f"{outside.sum()} lanes are outside of the {self.size} bytes of shared memory")
        return addresses + programs * self.pitch


def _span(x: Tensor) -> tuple[int, int]:
    last = sum((length - 1) * step for length, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _region(start: int, stop: int) -> _Region:
    base, end = start // 16 * 16, -(-stop // 16) * 16
    return _Region(start, stop, base, np.ctypeslib.as_array((ctypes.c_uint8 * (end - base)).from_address(base)))
