"""What an archive holds, as tokens to look at and as frames to take in again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.banks.erase import Frame, whole
from vmemory.banks.handover import Handover
from vmemory.banks.outbox import LEVEL, Outbox
from vmemory.banks.tokens import MemoryTokens, row_tables
from vmemory.ops.quantize_slots import dequantize_slots
from vmemory.reference.bank_layout import FRAMES, LAST, BankLayout

# sequence, numbers and clock of a stored entry
Found = tuple[int, list[int], list[float]]


class StoredFrames:
    """Reading what a store of the host holds, once a bank has it."""

    layout: BankLayout
    levels: tuple[int, ...]
    _store: Any
    _way: Handover | None
    # bytes of a cell in each part of a frame
    _widths: list[int]
    # of each stream: blocks below a sequence do not tell of frames from a number on, which have come anew since
    _branches: dict[int, list[tuple[int, int]]]

    @property
    def _handover(self) -> Handover:
        way = self._way
        if way is None:
            raise ValueError("archive: expected one that a bank has, got one without")
        # before any lock is taken: in a forked process its holder may not be there to let it go
        if not torch.compiler.is_compiling() and self._opened.forked:
            raise RuntimeError("archive: expected the process that made it, got one forked from it, which cannot write")
        return way

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
        return self._handover.box

    def _load(self, found: Found) -> tuple[Tensor, Tensor] | None:
        sequence, numbers, _ = found
        cells = self.layout.cells[numbers[LEVEL]] if numbers[LEVEL] >= 0 else self.layout.grid[0] * self.layout.grid[1]
        box = self.box
        payload = torch.zeros(cells * sum(self._widths), dtype=torch.uint8)
        read = self._opened.read(sequence, payload.numpy())
        if not read:
            return None
        if read != len(payload):
            raise RuntimeError(f"archive: expected {len(payload)} bytes of frame {numbers[1]}, got {read}")
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
        latest = {found[1][1]: found for found in sorted(self._opened.find(stream, t0, t1, False))}
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

    def _whole(self, stream: int) -> dict[int, Found]:
        """Entries of the past the bank has now, by number, that were neither reduced nor merged when they left."""
        self._handover.settle()
        grids, grid = self.layout.grids, self.layout.grid
        branches = self._branches.get(stream, [])
        latest = {
            numbers[1]: (sequence, numbers, clock)
            for sequence, numbers, clock in sorted(self._opened.find(stream, 0.0, 0.0, True))
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
