"""A snapshot of a graph's vectors beside its file, so that opening does not read them row by row."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from vmemory._files import replacing

# magic, version, channels, rows, checksum, identifier of the graph
_HEADER = struct.Struct("<8sIIQI36s")
_MAGIC, _VERSION = b"vmgrvecs", 1
# rows a block: 12 MB of 384 channels
BLOCK = 8192


def snapshot_path(path: Path) -> Path:
    """Return the name of the snapshot of a graph file."""
    return path.with_name(f"{path.name}-vectors")


def write_vectors(path: Path, uuid: str, dim: int, ids: np.ndarray, block: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write the vectors of the memories `ids` `[N]` int64; `block` returns those of some of them `[n, dim]`.

    The old snapshot is overwritten with zeros, since it may hold what has been forgotten.
    """
    with replacing(path) as made, made.open("r+b") as file:
        file.write(_HEADER.pack(_MAGIC, 0, 0, 0, 0, b""))
        checksum = zlib.crc32(ids.astype("<i8").tobytes())
        file.write(ids.astype("<i8").tobytes())
        for begin in range(0, len(ids), BLOCK):
            data = np.ascontiguousarray(block(ids[begin : begin + BLOCK]), "<f4").tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, _VERSION, dim, len(ids), checksum, uuid.encode()))
        file.flush()
        overwrite(path)


def read_vectors(path: Path, uuid: str, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read ids `[n]` and vectors `[n, dim]` block by block; nothing if there is no snapshot of this graph.

    A damaged snapshot ends early, and its last block is not given: what is not in it is read from the graph's file.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        head = file.read(_HEADER.size)
        size = path.stat().st_size
        if len(head) < _HEADER.size:
            return
        magic, version, channels, rows, checksum, owner = _HEADER.unpack(head)
        if (magic, version, channels, owner.rstrip(b"\0")) != (_MAGIC, _VERSION, dim, uuid.encode()):
            return
        # checked before anything is allocated
        if size != _HEADER.size + rows * (8 + 4 * dim):
            return
        data = file.read(8 * rows)
        found = zlib.crc32(data)
        ids = np.frombuffer(data, "<i8")
        for begin in range(0, rows, BLOCK):
            some = ids[begin : begin + BLOCK]
            data = file.read(len(some) * 4 * dim)
            found = zlib.crc32(data, found)
            if len(data) < len(some) * 4 * dim:
                return
            yield some, np.frombuffer(data, "<f4").reshape(len(some), dim)
        if found != checksum:
            raise ValueError("the checksum of the snapshot does not match")


def overwrite(path: Path) -> None:
    """Write zeros over a file, if it exists; its name and length stay."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        left = file.seek(0, 2)
        file.seek(0)
        zeros = bytes(1 << 20)
        while left > 0:
            left -= file.write(zeros[: min(left, len(zeros))])
        file.flush()
