"""What leaves a memory, kept by the host: in RAM or in a memory-mapped file, bounded by bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmemory.banks.budget import parse_bytes
from vmemory.banks.erase import Frame, whole
from vmemory.banks.outbox import LEVEL, Outbox
from vmemory.banks.tokens import MemoryTokens, row_tables
from vmemory.ops._checks import check_choice, check_int
from vmemory.reference.bank_layout import BankLayout

_Found = tuple[int, list[int], list[float]]


class Archive:
    """A bounded store of frames on the host, oldest out first, written by a thread of its own.

    A push copies frames into an outbox of fixed size on the device, without synchronising the host; `drain` hands them
    to the thread. On the CPU every push drains. On other devices call `drain()` when convenient, at least once in
    `outbox` frames: what finds the outbox full is dropped and counted.

    Args:
        budget: `"1GiB"` or bytes, of RAM or of the file; takes whole blocks as large as the bank's largest entry.
        path: A file instead of RAM; opened again it holds what it held, but for blocks torn by a killed process.
        keep: `"evicted"`: entries as they were when they left (of two merged the newer, before it was folded).
            `"frames"`: every frame as it comes in, from which `fork(time)` and `erase` can repeat the past under any
            policy.
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
        self.outbox, self.block = outbox, block
        try:
            self._make: Callable[..., Any] = import_module("vmemory._host").Archive
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"Archive: vmemory._host is not built ({error}); see python -m vmemory.info") from None
        self._store: Any = None
        self._box: Outbox | None = None
        self._paused, self._refused, self._pending = False, 0, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copies of a bank have no archive: a file has one writer."""
        return None

    def attach(self, layout: BankLayout, levels: tuple[int, ...], slots: Tensor) -> None:
        """Make store and outbox for a bank; what banks do when they are given an archive.

        Raises:
            ValueError: The archive belongs to another bank, or the budget holds no frame.
            RuntimeError: The file cannot be used; the message says why.
        """
        if self._box is not None:
            raise ValueError("archive: expected one that no bank has yet, got one in use")
        self.layout, self.levels = layout, levels
        box = Outbox(max(self.outbox, slots.shape[0]), layout, slots)
        rows = box.tokens.shape[1] if self.keep == "frames" else max(layout.cells, default=1)
        tag = f"{layout.grid} {layout.dim} {layout.grids} {slots.dtype} {self.keep}"
        size = rows * (layout.dim * slots.element_size() + 4)
        self._store = self._make(self.budget, size, "" if self.path is None else str(self.path), tag)
        self._box = box

    def moved(self, slots: Tensor) -> None:
        """Follow a bank whose tensors went to another device or dtype."""
        if self._box is not None and slots.device != self._box.tokens.device:
            self.drain()
            self._box = Outbox(self._box.room, self.layout, slots)
        if self._box is not None and slots.dtype != self._box.tokens.dtype:
            raise ValueError(f"archive: expected a bank of {self._box.tokens.dtype}, got {slots.dtype}")

    @property
    def box(self) -> Outbox:
        """The outbox on the device."""
        if self._box is None:
            raise ValueError("archive: expected one that a bank has, got one without")
        return self._box

    def counts(self) -> dict[str, int]:
        """Entries `held`, `capacity`, and `lost`: found the outbox or the thread's queue full. Synchronises."""
        return {
            "held": self._store.held(),
            "capacity": self._store.capacity,
            "lost": int(self.box.count[1]) + self._refused,
        }

    def drain(self) -> None:
        """Hand the outbox to the thread; synchronises the host."""
        box = self.box
        filled = int(box.count[0])
        self._pending = 0
        if not filled:
            return
        tokens, mass, numbers, clock = (t[:filled].cpu() for t in box.tensors()[:4])
        H, W = self.layout.grid
        for i, (facts, when) in enumerate(zip(numbers.tolist(), clock.tolist(), strict=True)):
            n = self.layout.cells[facts[LEVEL]] if facts[LEVEL] >= 0 else H * W
            payload = np.concatenate([_bytes(tokens[i, :n]), _bytes(mass[i, :n])])
            self._refused += not self._store.put(payload, facts, when, self.block)
        box.clear()

    def pushed(self, streams: int) -> None:
        """After each frame of a push: drain where that costs no waiting for a device, or is asked for."""
        if self._paused or torch.compiler.is_compiling():
            return
        self._pending += streams
        on_host = self.box.tokens.device.type == "cpu"
        if on_host or (self.block and self._pending + streams > self.box.room):
            self.drain()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What is pushed within the block reaches neither outbox nor store."""
        self.drain()
        lost, self._paused = self.box.count[1].clone(), True
        try:
            yield
        finally:
            self._paused = False
            self.box.clear()
            self.box.count[1] = lost

    def flush(self) -> None:
        """Wait until all that left the memory is stored, in a file also on disk."""
        self.drain()
        self._store.flush()

    def close(self) -> None:
        """Flush, and let go of the file; the archive cannot be used afterwards."""
        self.flush()
        self._store = self._box = None

    def check_times(self, stream: int) -> None:
        """Every entry of the stream has a time.

        Raises:
            ValueError: One came in without.
        """
        self.flush()
        found: list[_Found] = self._store.find(stream, 0.0, 0.0, True)
        timeless = sum(any(t != t for t in clock) for _, _, clock in found)
        if timeless:
            raise ValueError(
                f"t0, t1: expected an archive whose frames all came with a time, got {timeless} entries without"
            )

    def erase(self, t0: float, t1: float, stream: int = 0) -> int:
        """Overwrite every entry with a part in [t0, t1] seconds by zeros; the number of entries."""
        self.flush()
        # also the place that takes what finds no room
        self.box.clear()
        return int(self._store.erase(stream, t0, t1))

    def _load(self, found: _Found) -> tuple[Tensor, Tensor] | None:
        sequence, numbers, _ = found
        cells = self.layout.cells[numbers[LEVEL]] if numbers[LEVEL] >= 0 else self.layout.grid[0] * self.layout.grid[1]
        like = self.box.tokens
        split = cells * self.layout.dim * like.element_size()
        payload = np.empty(split + 4 * cells, dtype=np.uint8)
        if not self._store.read(sequence, payload):
            return None
        data = torch.from_numpy(payload)
        tokens = data[:split].clone().view(like.dtype).reshape(cells, self.layout.dim)
        return tokens.to(like.device), data[split:].clone().view(torch.float32).to(like.device)

    def recall(self, t0: float, t1: float, stream: int = 0) -> MemoryTokens:
        """The entries with a part in [t0, t1] seconds, in stream order: fields as in `MemoryTokens`.

        Level is −1 for frames kept as they came. Entries without a time are never found.

        Raises:
            ValueError: `t0` above `t1` or NaN.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        self.flush()
        latest = {found[1][1]: found for found in sorted(self._store.find(stream, t0, t1, False))}
        H, W = self.layout.grid
        owned = row_tables(self.layout, self.levels)
        parts: list[tuple[Tensor, ...]] = []
        for number in sorted(latest):
            _, numbers, clock = latest[number]
            loaded = self._load(latest[number])
            if loaded is None:
                continue
            tokens, mass = loaded
            tier, live = numbers[LEVEL], mass > 0
            first = self.layout.first_row[tier] if tier >= 0 else 0
            cell = owned["row_cell"][first : first + len(mass)] if tier >= 0 else torch.arange(H * W)
            cell = cell.to(mass.device)[live]
            frame = torch.full_like(cell, number)
            level = torch.full_like(cell, self.levels[tier] if tier >= 0 else -1)
            times = [torch.full(cell.shape, t, dtype=torch.float64, device=cell.device) for t in clock]
            parts.append((tokens[live], frame, times[0], cell, level, mass[live], number * H * W + cell, *times[1:]))
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=self.box.tokens.device)
            when = none.double()
            empty = self.box.tokens.new_zeros((0, self.layout.dim))
            return MemoryTokens(empty, none, when, none, none, none.float(), none, when, when)
        return MemoryTokens(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def whole_frames(self, stream: int, held: set[int], taken: int | None) -> dict[int, Frame]:
        """Frames not `held`, neither reduced nor merged when they left; none where with those it is not all `taken`."""
        self.flush()
        grids, grid = self.layout.grids, self.layout.grid
        found = {
            f[1][1]: f
            # a number given again, after a reset or a restore, means the frame that came last
            for f in sorted(self._store.find(stream, 0.0, 0.0, True))
            if f[1][4] == 1 and (f[1][LEVEL] < 0 or grids[f[1][LEVEL]] == grid)
        }
        if taken is not None and len(held | found.keys()) < taken:
            return {}
        frames = {}
        for number in found.keys() - held:
            loaded = self._load(found[number])
            if loaded is not None:
                frames[number] = whole(number, found[number][2][0], *loaded, self.layout)
        return frames

    def put_frames(self, stream: int, frames: list[Frame]) -> None:
        """Store whole frames that a repeated past no longer holds."""
        like = self.box.tokens
        level = -1 if self.keep == "frames" or not frames else self.layout.grids.index(self.layout.grid)
        for frame in frames:
            there = torch.ones(self.layout.grid) if frame.valid is None else frame.valid.float().cpu()
            payload = np.concatenate([_bytes(frame.tokens.to(like.dtype).cpu()), _bytes(there)])
            numbers = [stream, frame.number, frame.number, frame.number, 1, level]
            self._store.put(payload, numbers, [frame.time] * 3, True)
        self._store.flush()


def _bytes(x: Tensor) -> Any:
    return x.contiguous().flatten().view(torch.uint8).numpy()
