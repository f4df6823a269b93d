"""Results of reading a memory: tokens, entries, search results and frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.reference.bank_layout import FRAME, START, STOP, TIME, BankLayout

_FREE = torch.iinfo(torch.int64).max


class MemoryTokens(NamedTuple):
    """Tokens of a memory in stream order, N of them; padded reads put `[S, Nmax]` in front and fill `count [S]`.

    Attributes:
        tokens: `[N, D]`, the bank's dtype; float32 of a bank in 8 or 4 bits.
        frame: `[N]` int64 number of the frame a token comes from (merged: the first of its frames); −1 = padding.
        time: `[N]` float64 seconds, NaN where frames came without (a merged token: the mean of its frames).
        cell: `[N]` int64 cell h·W + w of the input grid that the token owns.
        level: `[N]` int64 tier, 0 first.
        weight: `[N]` float32 input cells the token is the mean of.
        source: `[N]` int64 position in the flattened T·H·W stream: sorted, unique, one source token per token.
        start, stop: `[N]` float64 seconds of the first and last frame merged into the token.
        count: `[S]` int64 tokens per stream of a padded read, else None.
    """

    tokens: Tensor
    frame: Tensor
    time: Tensor
    cell: Tensor
    level: Tensor
    weight: Tensor
    source: Tensor
    start: Tensor
    stop: Tensor
    count: Tensor | None = None  # type: ignore[assignment]  # shadows tuple.count on purpose

    @classmethod
    def of(cls, clip: Tensor, source: Tensor, time: Tensor | None = None) -> MemoryTokens:
        """Return tokens of a clip, chosen and unchanged; for policies of your own.

        Args:
            clip: `[T, H, W, D]`.
            source: `[N]` int64 positions in its flattened T·H·W stream, sorted and unique.
            time: `[T]` seconds; None = unknown.
        """
        T, H, W = clip.shape[:3]
        frame, cell = source // (H * W), source % (H * W)
        known = torch.full((T,), torch.nan) if time is None else time
        seconds = known.to(source.device, torch.float64)[frame]
        weight = torch.ones(source.shape, device=source.device)
        level = torch.zeros_like(source)
        return cls(clip.flatten(0, 2)[source], frame, seconds, cell, level, weight, source, seconds, seconds)


class SearchResult(NamedTuple):
    """Entries most similar to each query, best first; places that cannot be filled hold −inf, −1 and NaN.

    values `[Q, k]` float32 cosine; frame, level `[Q, k]` int64; time, start, stop `[Q, k]` float64 seconds.
    """

    values: Tensor
    frame: Tensor
    time: Tensor
    level: Tensor
    start: Tensor
    stop: Tensor


class Tier(NamedTuple):
    """A part of a memory whose entries have one size: its name, its level in `Entries`, its token grid (H, W)."""

    name: str
    level: int
    grid: tuple[int, int]


class Entries(NamedTuple):
    """Entries of one stream, in stream order.

    frame, first, last, frames `[n]` int64 (number, span and how many were merged); time, start, stop `[n]` float64
    seconds; level `[n]` int64; descriptor `[n, K]` the mean that similarity looks at.
    """

    frame: Tensor
    first: Tensor
    last: Tensor
    frames: Tensor
    time: Tensor
    start: Tensor
    stop: Tensor
    level: Tensor
    descriptor: Tensor


@dataclass
class Frame:
    """A frame as it came in: `tokens [H, W, D]`, `mask [H, W]` bool or None (all cells exist), time in seconds."""

    number: int
    time: float
    tokens: Tensor
    mask: Tensor | None


def whole_frame(number: int, time: float, tokens: Tensor, mass: Tensor, layout: BankLayout) -> Frame:
    """Return the frame of the token rows `[H·W, D]` and masses `[H·W]` it was held as."""
    there = mass.reshape(layout.grid) > 0
    return Frame(number, time, tokens.reshape(*layout.grid, -1), None if bool(there.all()) else there)


def row_tables(layout: BankLayout, levels: tuple[int, ...], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return for each token row `row_slot`, `row_cell`, `row_level`, all `[L]` int64.

    Output cell i of h along an axis owns input cell floor((i + 1/2) · H / h).
    """
    slot, cell, level = [], [], []
    H, W = layout.grid
    for tier, (h, w) in enumerate(layout.grids):
        rows, columns = (
            ((2 * torch.arange(n, device=device) + 1) * whole).div(2 * n, rounding_mode="floor")
            for n, whole in ((h, H), (w, W))
        )
        owned = (rows[:, None] * W + columns).flatten()
        capacity = layout.capacities[tier]
        slot.append(layout.first_slot[tier] + torch.arange(capacity, device=device).repeat_interleave(h * w))
        cell.append(owned.repeat(capacity))
        level.append(torch.full((capacity * h * w,), levels[tier], dtype=torch.int64, device=device))
    empty = [torch.zeros(0, dtype=torch.int64, device=device)]
    return {
        "row_slot": torch.cat(slot or empty),
        "row_cell": torch.cat(cell or empty),
        "row_level": torch.cat(level or empty),
    }


def padded_tokens(
    slots: Tensor,
    mass: Tensor,
    entry: Tensor,
    clock: Tensor,
    tables: dict[str, Tensor],
    cells: int,
    read: Callable[[Tensor], Tensor] | None = None,
) -> MemoryTokens:
    """Read every stream, `[S, L, ...]`: live rows first, in stream order, then padding. No host synchronisation.

    `read` gives the tokens `[S, L, D]` of rows `[S, L]` where `slots` does not hold them as they are.
    """
    row_slot, row_cell, row_level = (tables[name] for name in ("row_slot", "row_cell", "row_level"))
    live = mass > 0
    # [S, L]
    source = torch.where(live, entry[:, row_slot, FRAME] * cells + row_cell, _FREE)
    source, place = source.sort(dim=1, stable=True)
    live = source != _FREE
    slot = row_slot[place]
    time, start, stop = (clock[..., c].gather(1, slot) for c in (TIME, START, STOP))
    nan = torch.full_like(time, torch.nan)
    tokens = read(place) if read else slots.gather(1, place[..., None].expand(-1, -1, slots.shape[-1]))
    return MemoryTokens(
        tokens=tokens,
        frame=torch.where(live, entry[..., FRAME].gather(1, slot), -1),
        time=torch.where(live, time, nan),
        cell=torch.where(live, row_cell[place], -1),
        level=torch.where(live, row_level[place], -1),
        weight=mass.gather(1, place),
        source=torch.where(live, source, -1),
        start=torch.where(live, start, nan),
        stop=torch.where(live, stop, nan),
        count=live.sum(1),
    )


def compact_tokens(padded: MemoryTokens, stream: int) -> MemoryTokens:
    """Return one stream of a padded read without its padding; reads the count, so it synchronises the host once."""
    assert isinstance(padded.count, Tensor)
    n = int(padded.count[stream])
    return MemoryTokens(*(field[stream, :n] for field in padded[:-1]))
