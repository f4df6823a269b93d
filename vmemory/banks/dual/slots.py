"""Write into one of the two memories of a `DualState`; map the rows of a call to streams."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.banks.dual.state import DualState
from vmemory.ops.ring import ring_push_


class StreamMap(NamedTuple):
    """The map between the R rows of a call and the S streams of a memory.

    rows `[R]` the stream of each row as given, −1 = skipped; stream `[R]` the same within 0 and S − 1; there `[R]`
    whether the row has a stream; row `[S]` the row of each stream, within 0 and R − 1; fed `[S]` whether the stream has
    a row; whole: row s belongs to stream s.
    """

    rows: Tensor
    stream: Tensor
    there: Tensor
    row: Tensor
    fed: Tensor
    whole: bool

    @staticmethod
    def of(streams: Tensor | None, S: int, R: int, device: torch.device) -> StreamMap:
        rows = torch.arange(R, device=device) if streams is None else streams
        there = (rows >= 0) & (rows < S)
        row = torch.full((S + 1,), -1, dtype=torch.int64, device=device)
        # skipped rows meet in a place of their own
        row = row.scatter(0, torch.where(there, rows, S), torch.arange(R, device=device))[:-1]
        return StreamMap(rows, rows.clamp(0, S - 1), there, row.clamp_min(0), row >= 0, streams is None)

    def of_streams(self, values: Tensor) -> Tensor:
        """Return values `[R, ...]` of rows in stream order, `[S, ...]`; a stream without a row gets any."""
        return values if self.whole else values[self.row]

    def takes(self, rows: Tensor) -> Tensor:
        """Return `[S]` bool: the streams that are written to if only `rows [R]` (−1 = none) are written."""
        return self.fed & (self.of_streams(rows) >= 0)


class Arrived(NamedTuple):
    """One frame of each row, to be written.

    tokens `[R, N, D]`; mass `[R, n]` the input cells of each token that a slot would hold; time `[R]` seconds; extra
    `[R, n, E]` channels beyond `key_dim`, or None; masked: tokens may not exist; differentiable: keys and values stay
    out of the state.
    """

    tokens: Tensor
    mass: Tensor
    time: Tensor
    extra: Tensor | None
    stream_map: StreamMap
    masked: bool
    differentiable: bool


class Side(NamedTuple):
    """The working or the episodic part of a state; with gradients, keys and values are tensors of their own.

    tokens, keys, values `[S, L, n, D]`, means `[S, L, D]`, extra `[S, L, n, E]`, mass `[S, L, n]`, entry and clock
    `[S, L]`, pushed `[S]` frames ever written.
    """

    tokens: Tensor
    keys: Tensor
    values: Tensor
    means: Tensor
    extra: Tensor
    mass: Tensor
    entry: Tensor
    clock: Tensor
    pushed: Tensor

    @staticmethod
    def both(state: DualState) -> tuple[Side, Side]:
        """Return the working and the episodic memory."""
        L_w = state.working_tokens.shape[1]
        return (
            Side(*state[:5], state.mass[:, :L_w], state.entry[:, :L_w], state.clock[:, :L_w], state.entered),
            Side(*state[5:10], state.mass[:, L_w:], state.entry[:, L_w:], state.clock[:, L_w:], state.written),
        )

    def hit(self, slot: Tensor, fed: Tensor) -> Tensor:
        """Return `[S, L]` bool: True at slot `[S]` (modulo L) of each stream in `fed [S]`."""
        L = self.tokens.shape[1]
        return (torch.arange(L, device=slot.device) == (slot % max(L, 1))[:, None]) & fed[:, None]

    def store(
        self, slot: Tensor, rows: Tensor, key: Tensor, value: Tensor, mean: Tensor, number: Tensor, frame: Arrived
    ) -> Side:
        """Write the keys, values and other data of the tokens in `slot [S]`.

        These are key and value `[R, n, D]` and mean `[R, D]` of `rows [R]` that are not −1, and the frame's number
        `[S]`, time, mass and extra channels.
        """
        put(self.means[:, :, None], slot, rows, mean[:, None])
        if frame.extra is not None:
            put(self.extra, slot, rows, frame.extra)
        if not frame.differentiable:
            put(self.keys, slot, rows, key)
            put(self.values, slot, rows, value)
        # after the writes: inductor of torch 2.13 moves earlier reads of `slot` behind the last write, which changes
        # `slot` itself
        stream_map, hit = frame.stream_map, self.hit(slot, frame.stream_map.takes(rows))
        self.mass.copy_(torch.where(hit[..., None], stream_map.of_streams(frame.mass)[:, None], self.mass))
        self.entry.copy_(torch.where(hit, number[:, None], self.entry))
        self.clock.copy_(torch.where(hit, stream_map.of_streams(frame.time)[:, None], self.clock))
        if not frame.differentiable:
            return self
        keys, values = (
            torch.where(hit[..., None, None], new[:, None], old)
            for new, old in ((key, self.keys), (value, self.values))
        )
        return self._replace(keys=keys, values=values)


def put(slots: Tensor, slot: Tensor, rows: Tensor, value: Tensor) -> None:
    """Write `value [R, n, D]` into `slot [S]` (modulo M) of `slots [S, M, n, D]` for the streams `rows [R]` names."""
    # a ring writes where its counter points to, and skips the rows without a stream
    ring_push_(slots, slot.clone(), value[:, None], rows)
