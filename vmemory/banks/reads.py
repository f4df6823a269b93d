"""What can be asked of a bank: its tokens, its entries, the most similar ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vmemory.banks.lock import locked
from vmemory.banks.quantized import read_tokens
from vmemory.banks.state import StateModule
from vmemory.banks.tokens import Entries, MemoryTokens, Retrieved, compact_tokens, padded_tokens
from vmemory.ops._checks import check_int, check_tensor, shape_of
from vmemory.ops.similarity_topk import similarity_topk
from vmemory.reference.bank_layout import (
    DROPPED,
    FIRST,
    FRAME,
    FRAMES,
    LAST,
    LENGTH,
    SEEN,
    SKIPPED,
    START,
    STOP,
    TIME,
)


class BankReads(StateModule):
    """Reading a bank changes nothing in it."""

    @locked
    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens:
        """Everything held, in stream order, with provenance.

        Args:
            stream: Which stream; ignored by a padded read.
            padded: `[S, Nmax, ...]` of all streams with `count [S]`, without host synchronisation; else one stream,
                compact, at the price of one synchronisation.
        """
        state, tables = self.state, self._tables()
        read = partial(read_tokens, state, dim=self.layout.dim) if state.quantized else None
        tokens = padded_tokens(state.slots, state.mass, state.entry, state.clock, tables, self._cells, read)
        if padded:
            return tokens
        check_int("stream", stream, low=0, high=self.streams - 1)
        return compact_tokens(tokens, stream)

    @property
    def _cells(self) -> int:
        return self.layout.grid[0] * self.layout.grid[1]

    def _tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("row_slot", "row_cell", "row_level")}

    @locked
    def retrieve(self, query: Tensor, k: int, *, threshold: float | None = None, stream: int = 0) -> Retrieved:
        """The entries most similar to each query, by cosine with their means. No host synchronisation.

        Args:
            query: `[Q, D]` or `[Q, key_dim]`.
            k: Entries per query.
            threshold: Entries below this cosine are left out.
            stream: Which stream is searched.
        """
        check_tensor("query", query, "[Q, D]")
        if query.shape[1] not in (self.layout.dim, self.layout.key_dim):
            raise ValueError(f"query: expected [Q, {self.layout.key_dim}], got shape {shape_of(query)}")
        check_int("stream", stream, low=0, high=self.streams - 1)
        keys = self._of_own_tier(self.descriptor)[stream]
        found = similarity_topk(
            query[None, :, : self.layout.key_dim].to(keys.dtype),
            keys[None],
            k,
            where=(self.entry[stream, :, FRAME] >= 0)[None],
            norm=self._of_own_tier(self.norm)[stream][None],
        )
        values, slot = found.values[0], found.indices[0]
        if threshold is not None:
            slot = torch.where(values >= threshold, slot, -1)
            values = torch.where(values >= threshold, values, -torch.inf)
        there, at = slot >= 0, slot.clamp_min(0)
        levels = self._of_slots(self.levels)
        if self.layout.slots == 0:
            missing = torch.full_like(slot, -1)
            nan = torch.full(slot.shape, torch.nan, dtype=torch.float64, device=slot.device)
            return Retrieved(values, missing, nan, missing, nan, nan)
        clock = torch.where(there[..., None], self.clock[stream][at], torch.nan)
        return Retrieved(
            values,
            torch.where(there, self.entry[stream, :, FRAME][at], -1),
            clock[..., TIME],
            torch.where(there, levels[at], -1),
            clock[..., START],
            clock[..., STOP],
        )

    def _of_slots(self, of_tiers: Sequence[int]) -> Tensor:
        """`[M]` int64, to each slot the number of its tier; made where it is used, since copies from the host wait."""
        made = [self.entry.new_full((n,), value) for n, value in zip(self.layout.capacities, of_tiers, strict=True)]
        return torch.cat([self.entry.new_empty((0,)), *made])

    def _of_own_tier(self, of_maps: Tensor) -> Tensor:
        """Each slot's mean or its norm as the slot's own tier sees it: `[S, M, R, ...]` to `[S, M, ...]`."""
        if of_maps.shape[2] == 1:
            return of_maps[:, :, 0]
        slot = torch.arange(self.layout.slots, device=of_maps.device)
        return of_maps[:, slot, self._of_slots(range(self.layout.tiers))]

    @locked
    def entries(self, stream: int = 0) -> Entries:
        """What a stream holds, entry by entry in stream order; synchronises the host once."""
        check_int("stream", stream, low=0, high=self.streams - 1)
        entry, clock = self.entry[stream], self.clock[stream]
        slots = torch.nonzero(entry[:, FRAME] >= 0).flatten()
        slots = slots[entry[slots, FRAME].argsort()]
        entry, clock = entry[slots], clock[slots]
        level = self._of_slots(self.levels)[slots]
        return Entries(
            frame=entry[:, FRAME],
            first=entry[:, FIRST],
            last=entry[:, LAST],
            frames=entry[:, FRAMES],
            time=clock[:, TIME],
            start=clock[:, START],
            stop=clock[:, STOP],
            level=level,
            descriptor=self._of_own_tier(self.descriptor)[stream, slots],
        )

    @locked
    def counts(self, stream: int = 0) -> dict[str, int]:
        """Frames `seen`, `skipped` (taken by no interval, or erased), `dropped` and entries `held`; synchronises."""
        counter = self.counter[stream].tolist()
        return {
            "seen": counter[SEEN],
            "skipped": counter[SKIPPED],
            "dropped": counter[DROPPED],
            "held": sum(counter[LENGTH:]),
        }
