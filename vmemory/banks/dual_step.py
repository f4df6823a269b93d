"""Algorithm 1 of VLM², frame by frame, on state that the caller holds."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vmemory.banks.dual_state import DualState, bridged_slot
from vmemory.ops._checks import check_choice, check_int
from vmemory.ops.gated_fusion import gated_fusion
from vmemory.ops.memory_attention import memory_attention
from vmemory.ops.ring import ring_push_, slot_replace_

RULES = ("most-similar", "bridged")


class MemoryReader(nn.Module):
    """Projections of one attention over a memory: query `[D, D]`, key and value `[2D, D]`, output `[D, D]`."""

    def __init__(self, dim: int, heads: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.key_value = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        # the start of torch.nn.MultiheadAttention, where query, key and value are one matrix
        for linear in (self.query, self.key_value):
            nn.init.uniform_(linear.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens `[..., D]`."""
        key, value = self.key_value(tokens).chunk(2, -1)
        return key, value

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Tensor:
        """Projected queries `[R, N, D]` over slots `[R, M, n, D]` of which `count [R]` are valid; `[R, N, D]`."""
        heads = (self.heads, query.shape[-1] // self.heads)
        parts = (x.unflatten(-1, heads) for x in (query, keys, values))
        return self.out(memory_attention(*parts, count).flatten(-2))


class DualStep(nn.Module):
    """The weights of the dual memory and what happens to a frame; the arguments are those of `DualMemory`."""

    def __init__(
        self, dim: int, heads: int, hidden: int, activation: str, empty: str, slots: str, level: str, rule: str,
        salience: float | None, device: torch.device | str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        check_int("dim", dim, low=1)
        check_int("heads", heads, low=1)
        check_int("hidden", hidden, low=1)
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
        check_choice("activation", activation, ("relu", "gelu", "silu"))
        check_choice("empty", empty, ("frame", "zeros", "skip"))
        check_choice("slots", slots, ("tokens", "means"))
        check_choice("level", level, ("flat", "mean"))
        check_choice("rule", rule, RULES)
        if salience is not None and not (isinstance(salience, (int, float)) and 0 <= salience <= 1):
            raise ValueError(f"salience: expected None or between 0 and 1, got {salience!r}")
        self.activation: Literal["relu", "gelu", "silu"] = activation  # type: ignore[assignment]  # checked above
        self.level: Literal["flat", "mean"] = level  # type: ignore[assignment]  # checked above
        self.empty, self.slots, self.rule = empty, slots, rule
        self.threshold = salience
        self.working = MemoryReader(dim, heads, device, dtype)
        self.episodic = MemoryReader(dim, heads, device, dtype)
        self.gate_in = nn.Linear(2 * dim, hidden, device=device, dtype=dtype)
        self.gate_out = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.salience: nn.Sequential | None = None
        if salience is not None:
            half = max(dim // 2, 1)
            self.salience = nn.Sequential(
                nn.Linear(dim, half, device=device, dtype=dtype),
                nn.ReLU(),
                nn.Linear(half, 1, device=device, dtype=dtype),
            )

    def held(self, frames: Tensor) -> Tensor:
        """Frames `[..., N, D]` as a slot holds them, `[..., n, D]`."""
        return frames.mean(-2, keepdim=True) if self.slots == "means" else frames

    def run(
        self, state: DualState, frames: Tensor, times: Tensor, streams: Tensor | None,
        *, differentiable: bool = False, through_slots: bool = False,
    ) -> Tensor:  # fmt: skip
        """All M_t `[R, T, N, D]` of frames `[R, T, N, D]`; `state` is changed in place.

        Args:
            times: `[R, T]` float64.
            streams: `[R]` int64 stream of each row, rows outside of S are skipped and give zeros; None = all in order.
            differentiable: Keep keys and values out of `state`, where a gradient can follow them; needs `streams` None.
            through_slots: Let gradients pass from a reading into what was stored, not into the projections alone.
        """
        R, T = frames.shape[:2]
        if R == 0 or T == 0:
            return frames.new_zeros(frames.shape)
        feed = _Feed.of(streams, state.seen.shape[0], R, frames.device)
        caches: tuple[Tensor, ...] = (
            state.working_keys,
            state.working_values,
            state.episodic_keys,
            state.episodic_values,
        )
        for_working, for_episodic = self.working.query(frames), self.episodic.query(frames)
        kept = self.held(frames if through_slots else frames.detach())
        keys, values = self.working.project(kept)
        fused = []
        for t in range(T):
            frame, at = frames[:, t], state.seen.clone()
            # later frames of a call meet an empty memory only where a gate kept the earlier ones out
            fresh = (t == 0, t == 0 or self.salience is not None)
            by_working = self._recall(
                self.working, frame, for_working[:, t], caches[:2], at, feed, fresh[0], differentiable
            )
            by_episodic = self._recall(
                self.episodic, frame, for_episodic[:, t], caches[2:], state.written, feed, fresh[1], differentiable
            )
            m = gated_fusion(
                by_working, by_episodic, self.gate_in.weight, self.gate_in.bias, self.gate_out.weight,
                self.gate_out.bias, self.activation,
            )  # fmt: skip
            fused.append(m if feed.whole else torch.where(feed.there[:, None, None], m, 0))
            stored = self.held(m if through_slots else m.detach())
            ring_push_(state.working_tokens, state.seen, kept[:, t, None], feed.rows)
            slot, takers, overwritten = self._replace(state, stored.detach(), m.detach(), feed)
            key, value = self.episodic.project(stored)
            written = (
                (at, feed.rows, keys[:, t]),
                (at, feed.rows, values[:, t]),
                (slot, takers, key),
                (slot, takers, value),
            )
            caches = tuple(_write(c, *w, differentiable) for c, w in zip(caches, written, strict=True))
            hit_working = _hit(at % max(state.working_tokens.shape[1], 1), feed.fed, state.working_tokens)
            hit_episodic = _hit(slot, feed.of_streams(takers) >= 0, state.episodic_tokens)
            hit = torch.cat([hit_working, hit_episodic & feed.fed[:, None]], 1)
            state.entry.copy_(torch.where(hit, at[:, None], state.entry))
            state.clock.copy_(torch.where(hit, feed.of_streams(times[:, t])[:, None], state.clock))
            state.overwrites.add_(hit_episodic & overwritten[:, None])
        return torch.stack(fused, 1)

    def _recall(
        self, reader: MemoryReader, frame: Tensor, query: Tensor, cache: tuple[Tensor, ...], count: Tensor,
        feed: _Feed, fresh: bool, differentiable: bool,
    ) -> Tensor:  # fmt: skip
        """What a frame `[R, N, D]` reads from keys and values; `fresh` says that a memory may be empty."""
        keys, values = cache if feed.whole else (x[feed.stream] for x in cache)
        count = count if feed.whole else torch.where(feed.there, count[feed.stream], 0)
        slots = keys.shape[1]
        empty = count <= 0 if slots else torch.ones_like(count, dtype=torch.bool)
        fresh = fresh or slots == 0
        if fresh and self.empty == "frame":
            own = reader.project(self.held(frame))
            if slots == 0:
                keys, values = (x[:, None] for x in own)
            else:
                # the first slot of an empty memory is free: what is put there now is overwritten by the first entry
                place = torch.where(empty, torch.arange(frame.shape[0], device=frame.device), -1)
                first = torch.zeros_like(count)
                keys, values = (
                    _write(x, first, place, y, differentiable) for x, y in zip((keys, values), own, strict=True)
                )
            count = count.clamp_min(1)
        read = reader(query, keys, values, count)
        if fresh and self.empty != "frame":
            read = torch.where(empty[:, None, None], frame if self.empty == "skip" else torch.zeros_like(read), read)
        return read

    def _replace(self, state: DualState, stored: Tensor, m: Tensor, feed: _Feed) -> tuple[Tensor, Tensor, Tensor]:
        """Write M_t into the episodic memory.

        Returns:
            The slot `[S]` it took, the rows `[R]` that took one (−1 where a gate kept it out), and `[S]` bool,
            streams that overwrote a slot.
        """
        takers, at, capacity = feed.rows, state.written.clone(), state.episodic_tokens.shape[1]
        if self.salience is not None:
            takers = torch.where(self.salience(m.mean(1)).sigmoid()[:, 0] >= self.threshold, takers, -1)
        takes = feed.fed & (feed.of_streams(takers) >= 0)
        if self.rule == "most-similar" or capacity == 0:
            replaced = slot_replace_(state.episodic_tokens, state.written, stored, takers, level=self.level)
            slot = feed.of_streams(replaced)
            slot = torch.where(slot >= 0, slot, at)
        else:
            mean = m.mean(1, dtype=state.means.dtype)
            slot = bridged_slot(state.means[:, :, 0], state.entry[:, -capacity:], feed.of_streams(mean))
            slot = torch.where(at >= capacity, slot, at)
            ring_push_(state.episodic_tokens, slot.clone(), stored[:, None], takers)
            ring_push_(state.means, slot.clone(), mean[:, None, None], takers)
            state.written.add_(takes)
        return slot, takers, takes & (at >= capacity)


class _Feed(NamedTuple):
    """Which rows of a call feed which streams: rows `[R]`, their `stream` clamped into S, whether it is `there`;
    and of each stream the `row` clamped into R, and whether it is `fed`. `whole`: row s feeds stream s."""

    rows: Tensor
    stream: Tensor
    there: Tensor
    row: Tensor
    fed: Tensor
    whole: bool

    @staticmethod
    def of(streams: Tensor | None, S: int, R: int, device: torch.device) -> _Feed:
        rows = torch.arange(R, device=device) if streams is None else streams
        there = (rows >= 0) & (rows < S)
        row = torch.full((S + 1,), -1, dtype=torch.int64, device=device)
        # skipped rows meet in a place of their own
        row = row.scatter(0, torch.where(there, rows, S), torch.arange(R, device=device))[:-1]
        return _Feed(rows, rows.clamp(0, S - 1), there, row.clamp_min(0), row >= 0, streams is None)

    def of_streams(self, values: Tensor) -> Tensor:
        """Values `[R, ...]` of rows as values `[S, ...]` of the streams they feed; anything where none does."""
        return values if self.whole else values[self.row]


def _write(cache: Tensor, slot: Tensor, rows: Tensor, value: Tensor, differentiable: bool) -> Tensor:
    """Put `value [R, n, D]` into `slot [S]` (modulo M) of `cache [S, M, n, D]` for the streams that `rows [R]` name."""
    if not differentiable:
        ring_push_(cache, slot.clone(), value[:, None], rows)
        return cache
    hit = _hit(slot % max(cache.shape[1], 1), rows >= 0, cache)
    return torch.where(hit[..., None, None], value[:, None], cache)


def _hit(slot: Tensor, fed: Tensor, slots: Tensor) -> Tensor:
    """`[S, M]` bool: the slot `[S]` that each fed stream writes to."""
    return (torch.arange(slots.shape[1], device=slot.device) == slot[:, None]) & fed[:, None]
