"""Keep frames that leave a memory on the host, in RAM or in a file, bounded by bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory._files import sync_folder
from vmemory.banks.archive.outbox import Outbox
from vmemory.banks.archive.reader import Branches, StoredFrames
from vmemory.banks.archive.transfer import Transfer
from vmemory.banks.layout import parse_bytes
from vmemory.banks.results import Frame, MemoryTokens
from vmemory.ops._checks import check_choice, check_int
from vmemory.ops.quantize_slots import quantize_slots
from vmemory.reference.bank_layout import SEEN, BankLayout, BankState


class Archive:
    """A bounded store of frames on the host, oldest out first, written by a thread of its own.

    A push copies frames into an outbox of fixed size on the device, without synchronising the host. On the CPU a thread
    writes them after every push. On a CUDA device a second stream copies the outbox to pinned memory when it may be
    full. While a batch is being written, the next one waits for a later push. Frames that find the outbox full are
    dropped and counted. Pushes that are compiled or replayed from a CUDA graph only fill the outbox: call `drain()`
    once in `outbox` frames. The CUDA path has not run on a device yet.

    A bank in 8 or 4 bits is archived as codes and scales; `read` returns float32. Any thread may call any method; a
    forked process may not. Copies of a bank have no archive. If the file is truncated or removed while it is open, or
    the disk is full, the next push raises a RuntimeError; after `bank.archive = None` pushes work without an archive.

    Args:
        budget: `"1GiB"` or bytes, of RAM or of the file. The number of entries follows from the sizes of the tiers that
            they leave from. An index of about 250 bytes an entry comes on top.
        path: A file instead of RAM. A file that exists is read; blocks that a killed process left incomplete are
            skipped. It is locked: one archive at a time.
        keep: `"evicted"`: entries as they were when they left; of two merged ones, the newer before the merge.
            `"frames"`: every frame as it comes in; `fork(time)` and `erase` can then repeat the past under any policy.
        outbox: Frames the outbox holds, at least as many as the bank has streams.
        block: A push waits for room, at the price of synchronising, instead of dropping; eager mode only.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The native part of vmemory is missing.
    """

    def __init__(
        self,
        budget: str | int = "1GiB",
        path: str | Path | None = None,
        *,
        keep: str = "evicted",
        outbox: int = 64,
        block: bool = False,
    ) -> None:
        check_choice("keep", keep, ("evicted", "frames"))
        check_int("outbox", outbox, low=1)
        self.budget, self.path, self.keep = parse_bytes(budget), None if path is None else Path(path), keep
        if path is not None and (not str(path) or "\0" in str(path)):
            raise ValueError(f"path: expected the name of a file, got {str(path)!r}")
        self.outbox, self.block = outbox, block
        try:
            self._make: Callable[..., Any] = import_module("vmemory._host").Archive
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"Archive: vmemory._host is not built ({error}); see python -m vmemory.info") from None
        self._store: Any = None
        self._transfer_or_none: Transfer | None = None
        self._reader: StoredFrames | None = None
        self._paused, self._pending = False, 0
        self._branches: dict[int, Branches] = {}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Replace the archive by None in copies and pickles of a bank: a file has one writer."""
        return type(None), ()

    @property
    def _transfer(self) -> Transfer:
        transfer = self._transfer_or_none
        if transfer is None:
            raise ValueError("archive: expected one that a bank has, got one without")
        # before any lock is taken: in a forked process its holder may not be there to let it go
        if not torch.compiler.is_compiling() and self._opened.forked:
            raise RuntimeError("archive: expected the process that made it, got one forked from it, which cannot write")
        return transfer

    @property
    def _opened(self) -> Any:
        """The store, which another thread may close at any time."""
        store = self._store
        if store is None:
            raise ValueError("archive: expected one that a bank has, got one that was closed")
        return store

    @property
    def box(self) -> Outbox:
        """The outbox on the device."""
        return self._transfer.box

    def _settled(self) -> StoredFrames:
        """Wait until the store holds all that left so far, and return its reader."""
        self._transfer.settle()
        reader = self._reader
        if reader is None:
            raise ValueError("archive: expected one that a bank has, got one that was closed")
        return reader

    def attach(self, layout: BankLayout, levels: tuple[int, ...], state: BankState) -> None:
        """Make store and outbox for a bank, which calls this when its `archive` is set.

        Raises:
            ValueError: The archive belongs to another bank, or the budget holds no frame.
            RuntimeError: The file cannot be used; the message says why.
        """
        if self._transfer_or_none is not None:
            raise ValueError("archive: expected one that no bank has yet, got one in use")
        if state.slots.is_meta:
            raise ValueError("archive: expected a bank that holds frames, got one on the meta device")
        self.layout, self.levels, self.streams = layout, levels, state.counter.shape[0]
        H, W = layout.grid
        # cells of the frames to be stored: of those that come in, or of the tiers that they leave from
        sizes = {H * W} if self.keep == "frames" else {layout.cells[tier] for tier in layout.left}
        cells = [n if n in sizes else 0 for n in (H * W if self.keep == "frames" else 0, *layout.cells)]
        box = Outbox(max(self.outbox, state.slots.shape[0]), max(sizes, default=1), layout, state)
        tag = f"{layout.grid} {layout.dim} {layout.grids} {state.slots.dtype} {self.keep} {sorted(sizes)}"
        self._widths = [math.prod(part.shape[2:]) * part.element_size() for part in box.parts]
        try:
            name = b"" if self.path is None else os.fsencode(self.path)
            self._store = self._make(self.budget, cells, self._widths, name, tag)
        except RuntimeError as error:
            raise RuntimeError(f"{self.path}: {error}") from None
        if self.path is not None:
            sync_folder(self.path.resolve().parent)
        self._open(box)
        self.branch(state.counter[:, SEEN])

    def _open(self, box: Outbox) -> None:
        self._transfer_or_none = Transfer(box, self._store)
        self._reader = StoredFrames(self._store, box, self.layout, self.levels, self._widths)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Check that the bank's tokens may be of a dtype.

        Raises:
            ValueError: What is stored has another.
        """
        transfer = self._transfer_or_none
        if transfer is not None and dtype != transfer.box.parts[0].dtype:
            raise ValueError(f"archive: expected a bank of {transfer.box.parts[0].dtype}, got {dtype}")

    def moved(self, state: BankState) -> None:
        """Move the outbox after a bank whose tensors went to another device."""
        transfer = self._transfer_or_none
        if transfer is None:
            return
        old = transfer.box
        if state.slots.device != old.device:
            transfer.settle()
            box = Outbox(old.room, old.parts[0].shape[1], self.layout, state)
            box.count.copy_(old.count)
            self._open(box)

    def counts(self) -> dict[str, int]:
        """Return entries `held`, `capacity` (if all fill one block) and `lost` (outbox full); synchronises."""
        with self._transfer.lock:
            self._transfer.settle()
            lost = int(self.box.count[1])
        return {"held": self._opened.held(), "capacity": self._opened.capacity, "lost": lost}

    def drain(self) -> None:
        """Pass the outbox to the thread, unless the previous batch is still on its way.

        On the CPU this reads the outbox at once. On a CUDA device it queues a copy and does not wait for it.
        """
        if self._transfer.step():
            self._pending = 0

    def check_usable(self) -> None:
        """Check that the archive can take frames.

        Raises:
            ValueError: It was closed.
            RuntimeError: This process was forked from the one that writes.
        """
        if not torch.compiler.is_compiling() and self._transfer is not None:
            self._opened.busy()

    def taking(self) -> AbstractContextManager[object]:
        """Return the lock for the push of one frame, so other threads read before or after it."""
        return nullcontext() if torch.compiler.is_compiling() else self._transfer.lock

    def pushed(self, streams: int) -> None:
        """Pass the outbox on after a frame was pushed within `taking`, if it is time to."""
        transfer = self._transfer_or_none
        if transfer is None or self._paused or torch.compiler.is_compiling():
            return
        box = transfer.box
        if box.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._pending += streams
        full = self._pending + streams > box.room
        if self.block and full:
            transfer.settle()
            self._pending = 0
        elif full or box.device.type == "cpu":
            if transfer.step():
                self._pending = 0
        else:
            # the thread has all the time until the outbox is full again
            transfer.arrived()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Run a block whose pushes reach neither outbox nor store."""
        self._transfer.settle()
        lost, self._paused = self.box.count[1].clone(), True
        try:
            yield
        finally:
            self._paused = False
            self.box.clear()
            self.box.count[1] = lost

    def flush(self) -> None:
        """Wait until all frames are stored; a file is also synced to disk.

        Raises:
            RuntimeError: The disk does not take it.
        """
        self._transfer.settle()
        self._opened.sync()

    def close(self) -> None:
        """Write all frames and release the file; the archive cannot be used afterwards.

        Raises:
            RuntimeError: As `flush`; the file is released in any case.
        """
        with self._transfer.lock:
            try:
                self.flush()
            finally:
                self._store = self._transfer_or_none = self._reader = None

    def branch(self, seen: Tensor) -> None:
        """Record that streams continue after `seen [S]` frames; stored later frames can be read but not repeated."""
        if self._paused:
            return
        self._transfer.settle()
        sequence = self._opened.next()
        for stream, number in enumerate(seen.tolist()):
            earlier = [branch for branch in self._branches.get(stream, []) if branch[1] < number]
            self._branches[stream] = [*earlier, (sequence, number)]

    def check_times(self, stream: int) -> None:
        """Check that every entry of the stream has a time.

        Raises:
            ValueError: One came in without.
        """
        timeless = self._settled().timeless(stream)
        if timeless:
            raise ValueError(
                f"t0, t1: expected an archive whose frames all came with a time, got {timeless} entries without"
            )

    def read(self, t0: float, t1: float, stream: int = 0) -> MemoryTokens:
        """Return the entries with a part in [t0, t1] seconds, in stream order: fields as in `MemoryTokens`.

        Level is −1 for frames kept as they came. Entries without a time are never found.

        Raises:
            ValueError: `t0` above `t1` or NaN, or no such stream.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        reader = self._settled()
        check_int("stream", stream, low=0, high=self.streams - 1)
        return reader.read(t0, t1, stream)

    def whole_numbers(self, stream: int) -> set[int]:
        """Return the numbers of the frames that `whole_frames` would find."""
        return set(self._settled().whole(stream, self._branches.get(stream, [])))

    def whole_frames(self, stream: int, held: set[int], taken: int | None) -> dict[int, Frame]:
        """Return the frames not `held` that were neither reduced nor merged when they left, by number.

        Args:
            stream: Which stream.
            held: Numbers of frames that the bank still has.
            taken: Return none unless these and `held` are so many; None = return those there are.

        Raises:
            RuntimeError: The file was changed by another program.
        """
        reader = self._settled()
        found = reader.whole(stream, self._branches.get(stream, []))
        if taken is not None and len(held | found.keys()) < taken:
            return {}
        frames = {number: reader.frame(found[number]) for number in found.keys() - held}
        return {number: frame for number, frame in frames.items() if frame is not None}

    def erase(self, t0: float, t1: float, stream: int = 0) -> int:
        """Replace every entry with a part in [t0, t1] seconds by zeros; returns the number of entries.

        Raises:
            RuntimeError: The disk cannot be written; the entries cannot be read any more in any case.
        """
        gone = self.forget(stream, (t0, t1))
        self._opened.sync()
        return gone

    def forget(self, stream: int, span: tuple[float, float] | None) -> int:
        """Remove a span, or with None all of a stream, for every reader; `flush` then brings it to the disk."""
        if self._paused:
            return 0
        with self._transfer.lock:
            self._transfer.settle()
            self._transfer.clear()
            if span is None:
                self._branches.pop(stream, None)
            return int(self._opened.erase(stream, *(span or (0.0, 0.0)), span is None))

    def rows_of(self, stream: int, frames: list[Frame]) -> list[tuple[Tensor, ...]]:
        """Return copies of whole frames, as `put` stores them."""
        level = -1 if self.keep == "frames" or not frames else self.layout.grids.index(self.layout.grid)
        bits, kind = self.box.bits, self.box.parts[0].dtype
        rows = []
        for frame in frames:
            tokens = frame.tokens.flatten(0, 1)
            there = tokens.new_ones(tokens.shape[0]) if frame.mask is None else frame.mask.flatten()
            numbers = torch.tensor([stream, frame.number, frame.number, frame.number, 1, level])
            clock = torch.full((3,), frame.time, dtype=torch.float64)
            held = (tokens.to(kind, copy=True),) if bits is None else quantize_slots(tokens, bits)
            rows.append((*held, there.float(), numbers, clock))
        return rows

    def put(self, rows: list[tuple[Tensor, ...]]) -> None:
        """Write rows of `rows_of`: frames that left when the past was repeated."""
        self._transfer.put(rows)
