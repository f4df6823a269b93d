"""Read stored frames of an archive, as tokens or as whole frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.banks.archive.outbox import LEVEL, Outbox
from vmemory.banks.results import Frame, MemoryTokens, row_tables, whole_frame
from vmemory.ops.quantize_slots import dequantize_slots
from vmemory.reference.bank_layout import FRAMES, LAST, BankLayout

# sequence, numbers and clock of a stored entry
Found = tuple[int, list[int], list[float]]
# of one stream, pairs of sequence and frame number: an older block of a later frame belongs to a past that was undone
Branches = list[tuple[int, int]]


class StoredFrames:
    """Reader of a store of the host that holds frames of a bank's layout.

    Args:
        store: The host's store.
        box: The outbox of the frames; it defines the parts and dtypes of a stored frame.
        layout: Of the bank.
        levels: Level of each tier.
        widths: Bytes of a cell in each part of a frame.
    """

    def __init__(self, store: Any, box: Outbox, layout: BankLayout, levels: tuple[int, ...], widths: list[int]) -> None:
        self._store, self._box, self._layout, self._levels, self._widths = store, box, layout, levels, widths

    def read(self, t0: float, t1: float, stream: int) -> MemoryTokens:
        """Return the entries with a part in [t0, t1] seconds, in stream order, as `Archive.read`."""
        latest = {found[1][1]: found for found in sorted(self._store.find(stream, t0, t1, False))}
        layout, box = self._layout, self._box
        H, W = layout.grid
        owned = row_tables(layout, self._levels)
        parts: list[tuple[Tensor, ...]] = []
        for number in sorted(latest):
            _, numbers, clock = latest[number]
            loaded = self._load(latest[number])
            if loaded is None:
                continue
            tokens, mass = loaded
            tier, live = numbers[LEVEL], mass > 0
            first = layout.first_row[tier] if tier >= 0 else 0
            cell = owned["row_cell"][first : first + len(mass)] if tier >= 0 else torch.arange(H * W)
            cell = cell.to(mass.device)[live]
            frame = torch.full_like(cell, number)
            level = torch.full_like(cell, self._levels[tier] if tier >= 0 else -1)
            times = [torch.full(cell.shape, t, dtype=torch.float64, device=cell.device) for t in clock]
            parts.append((tokens[live], frame, times[0], cell, level, mass[live], number * H * W + cell, *times[1:]))
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=box.device)
            when = none.double()
            kind = box.parts[0].dtype if box.bits is None else torch.float32
            empty = torch.zeros((0, layout.dim), dtype=kind, device=box.device)
            return MemoryTokens(empty, none, when, none, none, none.float(), none, when, when)
        return MemoryTokens(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def timeless(self, stream: int) -> int:
        """Return the number of entries of a stream without a time."""
        found: list[Found] = self._store.find(stream, 0.0, 0.0, True)
        return sum(any(t != t for t in clock) for _, _, clock in found)

    def whole(self, stream: int, branches: Branches) -> dict[int, Found]:
        """Return the entries that were neither reduced nor merged when they left, by number, of this branch."""
        grids, grid = self._layout.grids, self._layout.grid
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

    def frame(self, found: Found) -> Frame | None:
        """Return an entry of `whole` as a frame, or None if it has been overwritten since.

        Raises:
            RuntimeError: A block was altered from outside.
        """
        loaded = self._load(found)
        return None if loaded is None else whole_frame(found[1][1], found[2][0], *loaded, self._layout)

    def _load(self, found: Found) -> tuple[Tensor, Tensor] | None:
        """Return tokens `[cells, D]` and mass `[cells]` of an entry."""
        sequence, numbers, _ = found
        layout, box = self._layout, self._box
        cells = layout.cells[numbers[LEVEL]] if numbers[LEVEL] >= 0 else layout.grid[0] * layout.grid[1]
        payload = torch.zeros(cells * sum(self._widths), dtype=torch.uint8)
        read = self._store.read(sequence, payload.numpy())
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
            parts[0] = dequantize_slots(parts[0], parts[1], dim=layout.dim)
        return parts[0], parts[-1]
