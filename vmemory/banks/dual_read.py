"""What a dual memory holds, as tokens, as entries and by similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.banks.dual_rules import overwrite_entropy
from vmemory.banks.dual_state import DualStateHolder
from vmemory.banks.lock import locked
from vmemory.banks.tokens import Entries, MemoryTokens, Retrieved, compact_tokens, padded_tokens
from vmemory.ops._checks import check_int, check_tensor, shape_of
from vmemory.ops.similarity_topk import similarity_topk


class DualReads(DualStateHolder):
    """Reading the state; `level` is 0 for the working memory (H_t) and 1 for the episodic memory (M_t)."""

    row_slot: Tensor
    row_cell: Tensor
    row_level: Tensor

    @locked
    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens:
        """The slots of both memories in stream order, `level` 0 = working (H_t), 1 = episodic (M_t).

        A frame that both hold comes twice, cell by cell, working first: `source` is unique within a level.

        Args:
            stream: Which stream; ignored by a padded read.
            padded: `[S, Nmax, ...]` of all streams with `count [S]`, without host synchronisation; else one stream,
                compact, at the price of one synchronisation.

        Raises:
            ValueError: No such stream.
        """
        slots = torch.cat([self.working_tokens.flatten(1, 2), self.episodic_tokens.flatten(1, 2)], 1)
        if self.working_rest.shape[-1]:
            rest = torch.cat([self.working_rest.flatten(1, 2), self.episodic_rest.flatten(1, 2)], 1)
            slots = torch.cat([slots, rest], -1)
        tables = {name: getattr(self, name) for name in ("row_slot", "row_cell", "row_level")}
        clock = self.clock[..., None].expand(*self.clock.shape, 3)
        cells = self.grid[0] * self.grid[1]
        tokens = padded_tokens(slots, self.mass.flatten(1), self.entry[..., None], clock, tables, cells)
        if padded:
            return tokens
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        return compact_tokens(tokens, stream)

    @locked
    def retrieve(self, query: Tensor, k: int, *, threshold: float | None = None, stream: int = 0) -> Retrieved:
        """The slots most similar to each query, by cosine with their means. No host synchronisation.

        Args:
            query: `[Q, D]` or `[Q, key_dim]`.
            k: Slots per query.
            threshold: Slots below this cosine are left out.
            stream: Which stream is searched.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        check_tensor("query", query, "[Q, D]")
        means = torch.cat([self.working_means, self.episodic_means], 1)
        if query.shape[1] not in (means.shape[2], means.shape[2] + self.working_rest.shape[3]):
            raise ValueError(f"query: expected [Q, {means.shape[2]}], got shape {shape_of(query)}")
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        there = (self.entry[stream] >= 0)[None]
        found = similarity_topk(query[None, :, : means.shape[2]].to(means.dtype), means[stream][None], k, where=there)
        values, slot = found.values[0], found.indices[0]
        if threshold is not None:
            slot = torch.where(values >= threshold, slot, -1)
            values = torch.where(values >= threshold, values, -torch.inf)
        # what −1 points to: one place behind the last slot
        frame = torch.cat([self.entry[stream], self.entry.new_full((1,), -1)])[slot]
        time = torch.cat([self.clock[stream], self.clock.new_full((1,), torch.nan)])[slot]
        level = torch.where(slot < 0, -1, (slot >= self.working_means.shape[1]).long())
        return Retrieved(values, frame, time, level, time, time)

    @locked
    def entries(self, stream: int = 0) -> Entries:
        """What a stream holds, slot by slot in stream order, working before episodic; synchronises the host once.

        Raises:
            ValueError: No such stream.
        """
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        slot = torch.nonzero(self.entry[stream] >= 0).flatten()
        slot = slot[self.entry[stream, slot].argsort(stable=True)]
        frame, time = self.entry[stream, slot], self.clock[stream, slot]
        means = torch.cat([self.working_means[stream], self.episodic_means[stream]])
        level = (slot >= self.working_means.shape[1]).long()
        return Entries(frame, frame, frame, torch.ones_like(frame), time, time, time, level, means[slot])

    @locked
    def counts(self, stream: int = 0) -> dict[str, int]:
        """Frames `seen`, that `entered` the working and were `written` into the episodic memory; slots `held`.

        Raises:
            ValueError: No such stream.
        """
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        held = (self.entry[stream] >= 0).sum()
        numbers = torch.stack([self.seen[stream], self.entered[stream], self.written[stream], held]).tolist()
        return dict(zip(("seen", "entered", "written", "held"), numbers, strict=True))

    @locked
    def overwrite_entropy(self) -> Tensor:
        """`[S]` float64 bits: how evenly overwrites fell on the episodic slots, see `overwrite_entropy`."""
        return overwrite_entropy(self.overwrites)
