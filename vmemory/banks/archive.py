"""What leaves a memory, kept by the host: in RAM or in a memory-mapped file, bounded by bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory.banks.budget import parse_bytes
from vmemory.banks.erase import Frame, whole
from vmemory.banks.handover import Handover
from vmemory.banks.outbox import LEVEL, Outbox
from vmemory.banks.quantized import AnyState
from vmemory.banks.tokens import MemoryTokens, row_tables
from vmemory.ops._checks import check_choice, check_int
from vmemory.ops.quantize_slots import dequantize_slots, quantize_slots
from vmemory.reference.bank_layout import FRAMES, LAST, SEEN, BankLayout

_Found = tuple[int, list[int], list[float]]


class Archive:
    """A bounded store of frames on the host, oldest out first, written by a thread of its own.

    A push copies frames into an outbox of fixed size on the device, without synchronising the host. From there they go
    to the thread: on the CPU after every push, on a CUDA device, where a stream of its own copies them to pinned
    memory, when the outbox may be full; either is left for a later push while the batch before is on its way. What
    finds the outbox full is dropped and counted. Pushes that are compiled or replayed from a CUDA graph only fill the
    outbox: call `drain()` once in `outbox` frames. The way of a CUDA device has not run on one yet.

    A bank in 8 or 4 bits is archived in codes and scales, as it holds them; `recall` gives float32.

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
        self._way: Handover | None = None
        self._paused, self._pending = False, 0
        # of each stream: blocks below a sequence do not tell of frames from a number on, which have come anew since
        self._branches: dict[int, list[tuple[int, int]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copies of a bank have no archive: a file has one writer."""
        return None

    def attach(self, layout: BankLayout, levels: tuple[int, ...], state: AnyState) -> None:
        """Make store and outbox for a bank; what banks do when they are given an archive.

        Raises:
            ValueError: The archive belongs to another bank, or the budget holds no frame.
            RuntimeError: The file cannot be used; the message says why.
        """
        if self._way is not None:
            raise ValueError("archive: expected one that no bank has yet, got one in use")
        self.layout, self.levels = layout, levels
        H, W = layout.grid
        whole_frame = H * W if self.keep == "frames" else 0
        box = Outbox(max(self.outbox, state.slots.shape[0]), max(whole_frame, *layout.cells, 1), layout, state)
        tag = f"{layout.grid} {layout.dim} {layout.grids} {state.slots.dtype} {self.keep}"
        self._widths = [math.prod(part.shape[2:]) * part.element_size() for part in box.parts]
        path = "" if self.path is None else str(self.path)
        self._store = self._make(self.budget, [whole_frame, *layout.cells], self._widths, path, tag)
        self._way = Handover(box, self._store)
        self.branch(state.counter[:, SEEN])

    def moved(self, state: AnyState) -> None:
        """Follow a bank whose tensors went to another device or dtype."""
        if self._way is None:
            return
        old = self._way.box
        if state.slots.dtype != old.parts[0].dtype:
            raise ValueError(f"archive: expected a bank of {old.parts[0].dtype}, got {state.slots.dtype}")
        if state.slots.device != old.device:
            self._way.settle()
            box = Outbox(old.room, old.parts[0].shape[1], self.layout, state)
            box.count.copy_(old.count)
            self._way = Handover(box, self._store)

    @property
    def _handover(self) -> Handover:
        if self._way is None:
            raise ValueError("archive: expected one that a bank has, got one without")
        return self._way

    @property
    def box(self) -> Outbox:
        """The outbox on the device."""
        return self._handover.box

    def counts(self) -> dict[str, int]:
        """Entries `held`, `capacity`, and `lost`: found the outbox full. Synchronises."""
        self._handover.settle()
        return {"held": self._store.held(), "capacity": self._store.capacity, "lost": int(self.box.count[1])}

    def drain(self) -> None:
        """Send what the outbox holds on to the thread, unless the batch before is still on its way.

        On the CPU this reads the outbox at once; on a CUDA device it queues a copy and does not wait for it.
        """
        if self._handover.step():
            self._pending = 0

    def pushed(self, streams: int) -> None:
        """After each frame of a push: send on what the outbox holds, where it is time and nobody waits for it."""
        if self._paused or torch.compiler.is_compiling():
            return
        box = self.box
        if box.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._pending += streams
        full = self._pending + streams > box.room
        if self.block and full:
            self._handover.settle()
            self._pending = 0
        elif full or box.device.type == "cpu":
            self.drain()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What is pushed within the block reaches neither outbox nor store."""
        self._handover.settle()
        lost, self._paused = self.box.count[1].clone(), True
        try:
            yield
        finally:
            self._paused = False
            self.box.clear()
            self.box.count[1] = lost

    def flush(self) -> None:
        """Wait until all that left the memory is stored, in a file also on disk.

        Raises:
            RuntimeError: The disk does not take it.
        """
        self._handover.settle()
        self._store.sync()

    def close(self) -> None:
        """Flush, and let go of the file; the archive cannot be used afterwards."""
        self.flush()
        self._store = self._way = None

    def branch(self, seen: Tensor) -> None:
        """Streams go on after `seen [S]` frames: what is stored of later ones is recalled, but repeats no past."""
        if self._paused:
            return
        self._handover.settle()
        sequence = self._store.next()
        for stream, number in enumerate(seen.tolist()):
            earlier = [branch for branch in self._branches.get(stream, []) if branch[1] < number]
            self._branches[stream] = [*earlier, (sequence, number)]

    def check_times(self, stream: int) -> None:
        """Every entry of the stream has a time.

        Raises:
            ValueError: One came in without.
        """
        self._handover.settle()
        found: list[_Found] = self._store.find(stream, 0.0, 0.0, True)
        timeless = sum(any(t != t for t in clock) for _, _, clock in found)
        if timeless:
            raise ValueError(
                f"t0, t1: expected an archive whose frames all came with a time, got {timeless} entries without"
            )

    def erase(self, t0: float, t1: float, stream: int = 0) -> int:
        """Overwrite every entry with a part in [t0, t1] seconds by zeros; the number of entries.

        Raises:
            RuntimeError: The disk does not take it; no entry can be recalled all the same.
        """
        gone = self.forget(stream, (t0, t1))
        self._store.sync()
        return gone

    def forget(self, stream: int, span: tuple[float, float] | None) -> int:
        """`erase`, or with None all of a stream, for every reader; `flush` then brings it to the disk."""
        if self._paused:
            return 0
        self._handover.settle()
        self._handover.clear()
        if span is None:
            self._branches.pop(stream, None)
        return int(self._store.erase(stream, *(span or (0.0, 0.0)), span is None))

    def _load(self, found: _Found) -> tuple[Tensor, Tensor] | None:
        sequence, numbers, _ = found
        cells = self.layout.cells[numbers[LEVEL]] if numbers[LEVEL] >= 0 else self.layout.grid[0] * self.layout.grid[1]
        box = self.box
        payload = torch.empty(cells * sum(self._widths), dtype=torch.uint8)
        if not self._store.read(sequence, payload.numpy()):
            return None
        pieces = payload.split([cells * width for width in self._widths])
        parts = [
            piece.clone().view(part.dtype).view(cells, *part.shape[2:]).to(box.device)
            for piece, part in zip(pieces, box.parts, strict=True)
        ]
        if box.bits is not None:
            parts[0] = dequantize_slots(parts[0], parts[1], dim=self.layout.dim)
        return parts[0], parts[-1]

    def recall(self, t0: float, t1: float, stream: int = 0) -> MemoryTokens:
        """The entries with a part in [t0, t1] seconds, in stream order: fields as in `MemoryTokens`.

        Level is −1 for frames kept as they came. Entries without a time are never found.

        Raises:
            ValueError: `t0` above `t1` or NaN.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        self._handover.settle()
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
            none = torch.zeros(0, dtype=torch.int64, device=self.box.device)
            when = none.double()
            kind = self.box.parts[0].dtype if self.box.bits is None else torch.float32
            empty = torch.zeros((0, self.layout.dim), dtype=kind, device=self.box.device)
            return MemoryTokens(empty, none, when, none, none, none.float(), none, when, when)
        return MemoryTokens(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _whole(self, stream: int) -> dict[int, _Found]:
        """Entries of the past the bank has now, by number, that were neither reduced nor merged when they left."""
        self._handover.settle()
        grids, grid = self.layout.grids, self.layout.grid
        branches = self._branches.get(stream, [])
        latest = {
            numbers[1]: (sequence, numbers, clock)
            for sequence, numbers, clock in sorted(self._store.find(stream, 0.0, 0.0, True))
            if not any(sequence < mark and numbers[1 + LAST] >= number for mark, number in branches)
        }
        return {
            number: found
            for number, found in latest.items()
            if found[1][1 + FRAMES] == 1 and (found[1][LEVEL] < 0 or grids[found[1][LEVEL]] == grid)
        }

    def whole_numbers(self, stream: int) -> set[int]:
        """Numbers of the frames that `whole_frames` would find."""
        return set(self._whole(stream))

    def whole_frames(self, stream: int, held: set[int], taken: int | None) -> dict[int, Frame]:
        """Frames not `held`, neither reduced nor merged when they left; none where with those it is not all `taken`.

        Raises:
            RuntimeError: A block was altered from outside.
        """
        found = self._whole(stream)
        if taken is not None and len(held | found.keys()) < taken:
            return {}
        frames = {}
        for number in found.keys() - held:
            loaded = self._load(found[number])
            if loaded is not None:
                frames[number] = whole(number, found[number][2][0], *loaded, self.layout)
        return frames

    def rows_of(self, stream: int, frames: list[Frame]) -> list[tuple[Tensor, ...]]:
        """Copies of whole frames, as `put` stores them."""
        level = -1 if self.keep == "frames" or not frames else self.layout.grids.index(self.layout.grid)
        bits, kind = self.box.bits, self.box.parts[0].dtype
        rows = []
        for frame in frames:
            tokens = frame.tokens.flatten(0, 1)
            there = tokens.new_ones(tokens.shape[0]) if frame.valid is None else frame.valid.flatten()
            numbers = torch.tensor([stream, frame.number, frame.number, frame.number, 1, level])
            clock = torch.full((3,), frame.time, dtype=torch.float64)
            held = (tokens.to(kind, copy=True),) if bits is None else quantize_slots(tokens, bits)
            rows.append((*held, there.float(), numbers, clock))
        return rows

    def put(self, rows: list[tuple[Tensor, ...]]) -> None:
        """Store what `rows_of` made of frames that a repeated past no longer holds."""
        self._handover.put(rows)
