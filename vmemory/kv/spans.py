"""Evict rows of a key-value cache span by span, decided by the memory banks' operator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vmemory.kv.rules import Rows
from vmemory.ops import bank_push_
from vmemory.ops._checks import check_int
from vmemory.reference.bank_layout import FRAME, BankLayout, BankState


class SpanRule:
    """Keep or evict spans of rows as a memory bank does frames, described by their mean values.

    Values describe a span, not keys, because keys are rotated by their position: equal rows have different keys at
    different positions. Rows of the span that is still open always stay.

    Args:
        budget: Rows to keep.
        sinks: First rows of the stream, which always stay and belong to no span.
        rule: A rule of `vmemory.reference.bank_layout.RULES`.
        span: Rows of a span; for a frame, the largest number of rows.
        thin: One number per tier: a span in the tier keeps every `thin`-th row. The tiers get equal shares of rows.

    Raises:
        ValueError: The budget is smaller than an open span and one span per tier.
    """

    share = "cache"
    observes = 0

    def __init__(self, budget: int, sinks: int, rule: str, span: int = 16, thin: Sequence[int] = (1,)) -> None:
        check_int("span", span, low=1)
        if not thin or any(not isinstance(n, int) or n < 1 for n in thin) or thin[0] != 1:
            raise ValueError(f"thin: expected 1 and then larger numbers, one a tier, got {thin!r}")
        if any(b % a for a, b in pairwise(thin)):
            raise ValueError(f"thin: expected each number to be a multiple of the one before, got {thin!r}")
        self.budget, self.sinks, self.rule, self.span, self.thin = budget, sinks, rule, span, tuple(thin)
        share = (budget - sinks - span) // len(self.thin)
        self.capacities = tuple(max(share, 0) // -(-span // n) for n in self.thin)
        if min(self.capacities) < 1:
            least = sinks + span * (1 + len(self.thin))
            raise ValueError(f"budget: expected at least {least} rows for spans of {span}, got {budget}")
        self.layout: BankLayout | None = None
        self.state: BankState | None = None
        self.number: Tensor | None = None  # [L', B, G', n] the span of each row, −1 = a sink
        self.place: Tensor | None = None  # [L', B, G', n] position in its span
        self.spans = self.open = 0  # number of full spans, rows of the open span

    def check(self, rows: Rows) -> None:
        """Raise ValueError if the new rows do not fit, before anything has changed."""
        if rows.whole and rows.new > self.span:
            raise ValueError(f"cache: expected at most span={self.span} rows in a frame, got {rows.new}")

    def take(self, rows: Rows) -> None:
        """Cut the new rows into spans and push the full ones into the bank."""
        seen = rows.seen
        sinks = min(max(self.sinks - seen, 0), rows.new)
        fresh = torch.arange(rows.new - sinks, device=rows.token.device)
        if rows.whole:
            closed = [n for n in (self.open, len(fresh)) if n]
            number, place = torch.full_like(fresh, self.spans + len(closed) - 1), fresh
        else:
            closed = [self.span] * ((self.open + len(fresh)) // self.span)
            number, place = self.spans + (self.open + fresh) // self.span, (self.open + fresh) % self.span
        tail = self.open + len(fresh)
        beside = fresh.new_full((sinks,), -1)
        shape = (*rows.token.shape[:3], rows.new)
        number, place = (torch.cat([beside, x]).expand(shape) for x in (number, place))
        self.number = number if self.number is None else torch.cat([self.number, number], 3)
        self.place = place if self.place is None else torch.cat([self.place, place], 3)
        self.spans, self.open = self.spans + len(closed), tail - sum(closed)
        if closed:
            self._push(rows, tail, closed)

    def _push(self, rows: Rows, tail: int, lengths: list[int]) -> None:
        means = []
        for value in rows.values:
            parts = value[:, :, value.shape[2] - tail :].split([*lengths, tail - sum(lengths)], 2)[: len(lengths)]
            means.append(torch.stack([part.float().mean(2) for part in parts], 2))
        layers, _, heads, _ = rows.token.shape
        frames = torch.stack(means)  # [L, B, G, T, E]
        # layers or heads that decide together form one descriptor; those that decide alone are streams
        order = [dim for dim, alone in ((0, layers > 1), (1, True), (2, heads > 1)) if alone]
        rest = [dim for dim in (0, 2) if dim not in order]
        frames = frames.permute(*order, 3, *rest, 4).flatten(0, len(order) - 1).flatten(2)
        frames = frames.reshape(rows.token.shape[:3].numel(), len(lengths), 1, 1, -1)
        if self.state is None or self.layout is None:
            tiers, dim = len(self.capacities), frames.shape[-1]
            self.layout = BankLayout((1, 1), dim, dim, self.capacities, ((1, 1),) * tiers, rule=self.rule)
            self.state = self.layout.new_state(frames.shape[0], frames.device, frames.dtype)
        bank_push_(self.state, self.layout, frames)

    def keep(self, rows: Rows) -> Tensor:
        """Return indices `[L', B, G', n']` int64 of the rows that stay, ascending; n' is at most the budget."""
        assert self.number is not None
        assert self.place is not None
        shape = rows.token.shape
        number, place = self.number.flatten(0, 2), self.place.flatten(0, 2)
        step = torch.zeros_like(number)
        if self.state is not None and self.layout is not None:
            thin = number.new_tensor([self.thin[tier] for tier in self.layout.tier_of])
            held = number[:, :, None] == self.state.entry[:, None, :, FRAME]
            step = (held * thin).amax(2)
        in_span = (step > 0) & (place % step.clamp(min=1) == 0) | (number == self.spans)
        # with short frames the streams' counts differ, but a cache is rectangular: the oldest surplus rows leave
        count = in_span.sum(1, keepdim=True)
        in_span &= in_span.cumsum(1) > count - count.min()
        index = ((number < 0) | in_span).nonzero()[:, 1]
        return index.view(*shape[:3], -1)

    def move(self, index: Tensor) -> None:
        """Move per-row data by `index`, the result of the last `keep`."""
        assert self.number is not None
        assert self.place is not None
        self.number, self.place = self.number.gather(3, index), self.place.gather(3, index)
