"""Bound a language model's key-value cache: it reads any number of tokens and holds a fixed number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vmemory.banks.layout import parse_bytes
from vmemory.banks.lock import MemoryLock, locked
from vmemory.kv.attention import observed_queries
from vmemory.kv.cache import new_cache, one_input, plain_layers
from vmemory.kv.rules import SHARES, Attention, KeyDifference, Recent, Reservoir, RowRule, Rows
from vmemory.kv.spans import SpanRule
from vmemory.models.hooks import generation_setting
from vmemory.models.turn import cache_argument
from vmemory.ops._checks import check_choice, check_int, shape_of

if TYPE_CHECKING:
    from transformers import Cache
    from transformers.utils import ModelOutput

Rule = RowRule | SpanRule

POLICIES: dict[str, Callable[..., Rule]] = {
    "attention": Attention,
    "keys": KeyDifference,
    "recent": Recent,
    "reservoir": Reservoir,
    "uniform": partial(SpanRule, rule="uniform"),
    "similar": partial(SpanRule, rule="paper"),
    "hierarchical": partial(SpanRule, rule="paper", thin=(1, 4, 16)),
}


class Prefill(NamedTuple):
    """A cache that has read its input, and the model's output for the last chunk (with a head: `output.logits`)."""

    cache: Cache
    output: ModelOutput


class KVMemory:
    """Bounded key-value cache: evict rows of a `transformers` cache to hold at most `budget` after every update.

    Rows keep their keys and thus their true positions. New rows need positions that count the tokens read, not the rows
    held; `stream`, `prefill` and `generate` pass them. A query sees exactly the result of full attention under a mask
    of the rows that were held at its time.

    `share` selects which rows leave together: `"cache"` evicts the same tokens from all layers, `"layer"` decides layer
    by layer, `"head"` for each key head of each layer. The number of rows is the same everywhere, because layers share
    one mask. Entries of a batch decide independently and must have the same length: there is no padding.

    A memory belongs to one cache. Threads that use it at the same time take turns pass by pass. A thread with another
    cache than that of the last pass gets an error.

    Args:
        budget: Rows a layer may hold between two passes of the model, for each entry of the batch, or bytes of all
            keys and values as text, e.g. `"64MiB"`. During a pass the rows of its chunk come on top.
        policy: Which rows stay. Row by row: `"attention"` the rows that recent queries attend to (H2O, SnapKV),
            `"keys"` rows whose keys differ from the others (KeyDiff), `"recent"` the newest (StreamingLLM),
            `"reservoir"` a fair sample. Span by span, decided on mean values as by the memory bank: `"uniform"`,
            `"similar"` (the older of the most similar neighbours leaves), `"hierarchical"` (the same, but a span is
            first thinned to every 4th and 16th row).
        share: `"cache"`, `"layer"` or `"head"`; None = `"head"` for `"attention"` and `"keys"`, else `"cache"`.
        sinks: First rows of the stream that always stay (attention sinks, arXiv 2309.17453).
        options: `recent` (share of the budget for the newest rows, 0.5) for policies by the row, `half_life` and
            `window` for `"attention"`, `seed` for `"reservoir"`, `span` (16) and `thin` for policies by the span:
            see the classes in `POLICIES`.

    Attributes:
        token: `[L', B, G', n]` int64, the number in the stream of each row held; L' and G' are 1 if layers or heads
            decide together.
        time: Seconds of each row held, shaped like `token`, float64; NaN for rows without a time.
        seen: Rows read so far.

    Raises:
        TypeError, ValueError: An argument does not fit.
    """

    token: Tensor
    time: Tensor

    def __init__(
        self, budget: int | str, policy: str = "attention", *, share: str | None = None, sinks: int = 4, **options: Any
    ) -> None:
        check_choice("policy", policy, tuple(POLICIES))
        if share is not None:
            check_choice("share", share, SHARES)
        check_int("sinks", sinks, low=0)
        self._bytes = parse_bytes(budget) if isinstance(budget, str) else None
        if self._bytes is None:
            check_int("budget", budget, low=1)
        known = [name for name in signature(POLICIES[policy]).parameters if name not in ("budget", "sinks", "rule")]
        for name in options:
            if name not in known:
                raise TypeError(f"{name}: expected an option of {policy!r}, {', '.join(known)}, got {options[name]!r}")
        # held during a pass and its update
        self._lock = MemoryLock()
        self.budget, self.policy, self.sinks = budget, policy, sinks
        self._options = options
        # for a budget in bytes, the number of rows is known with the first cache only
        probe = self._rule(2**31 if self._bytes else int(budget))
        self.share = share or probe.share
        self._last = probe.observes
        self.reset()

    def _rule(self, rows: int) -> Rule:
        return POLICIES[self.policy](rows, self.sinks, **self._options)

    @locked
    def reset(self) -> None:
        """Reset the memory; the next cache may be another one."""
        self.rule: Rule | None = None
        self.seen = 0
        self._queries: dict[int, Tensor] = {}
        self._next: Tensor | None = None

    def observing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Record the queries of `model` within a context, which `"attention"` needs; the model is not changed.

        `stream`, `prefill` and `generate` do this themselves. Use it in your own loops, around the model and `update`.
        """
        return observed_queries(model, self._queries, self._last)

    @torch.no_grad()
    @locked
    def update(self, cache: Cache, span: int | None = None, time: float | None = None) -> Tensor:
        """Register the rows added since the last call, and evict rows beyond the budget.

        Args:
            cache: A `DynamicCache` with the rows of the last call followed by the new rows. Keys `[B, G, n, E]` and
                values of its layers are replaced by the remaining rows.
            span: The number of new rows, to be checked; None = not checked.
            time: Seconds, if the new rows are one frame; policies by span treat them as one span.

        Returns:
            `[L', B, G', n']` int64, ascending, the indices of the remaining rows in the given cache.

        Raises:
            ValueError: A layer is not plain attention (linear, sliding, static or shared layers cannot lose rows), the
                cache is not the one of the last call, or `"attention"` saw no queries. Nothing has changed.
        """
        layers = plain_layers(cache)
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        B, G, n, _ = keys[0].shape
        L = 1 if self.share == "cache" else len(keys)
        shape = (L, B, G if self.share == "head" else 1)
        held = 0 if self.rule is None else self.token.shape[3]
        if self.rule is not None and shape != self.token.shape[:3]:
            raise ValueError(f"cache: expected decisions {list(self.token.shape[:3])} as before, got {list(shape)}")
        new = n - held
        if new < 0 or (span is not None and span != new):
            want = "at least 0" if span is None else str(span)
            raise ValueError(f"cache: expected {held} rows of before and {want} new ones, got {n}")
        rule = self._rule(self._limit(keys, values)) if self.rule is None else self.rule
        numbers = torch.arange(self.seen, self.seen + new, device=keys[0].device).expand(*shape, new)
        seconds = numbers.new_full(numbers.shape, float("nan") if time is None else time, dtype=torch.float64)
        token = numbers if self.rule is None else torch.cat([self.token, numbers], 3)
        queries = [self._queries[i] for i in sorted(self._queries)]
        rows = Rows(keys, values, queries, token, new, self.seen, whole=time is not None)
        if new == 0:
            return torch.arange(n, device=keys[0].device).expand(*shape, n)
        rule.check(rows)

        rule.take(rows)
        index = rule.keep(rows)
        if index.shape[3] < n:
            for i, layer in enumerate(layers):
                at = index[min(i, L - 1)][..., None]
                layer.keys, layer.values = (
                    x.gather(2, at.expand(-1, G, -1, x.shape[3])) for x in (layer.keys, layer.values)
                )
            rule.move(index)
        self.time = (seconds if self.rule is None else torch.cat([self.time, seconds], 3)).gather(3, index)
        self.token, self.rule, self.seen = token.gather(3, index), rule, self.seen + new
        self._queries.clear()
        return index

    def _limit(self, keys: list[Tensor], values: list[Tensor]) -> int:
        if self._bytes is None:
            return int(self.budget)
        row = sum(x[:, :, :1].numel() * x.element_size() for x in (*keys, *values))
        return self._bytes // row

    def stream(
        self,
        model: nn.Module,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        chunk: int = 64,
        time: float | None = None,
        **kwargs: Any,
    ) -> Iterator[Prefill]:
        """Read tokens chunk by chunk; after each chunk evict rows and yield the model's output.

        Args:
            model: A language model of transformers, with or without a head, or a model around one.
            input_ids: `[B, N]` int64, or
            inputs_embeds: `[B, N, C]`.
            position_ids: `[B, N]` or `[3 or 4, B, N]`; omitted = continued from the last one.
            cache: The cache to continue; omitted = a new cache, and the memory is reset.
            chunk: Tokens per pass. Smaller chunks evict earlier; rows and chunk together bound the memory of a pass.
            time: Seconds, if the tokens are one frame; the model reads them in one pass.
            kwargs: Arguments of the model's forward.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds`, or shapes that do not fit.
        """
        name, inputs = one_input(input_ids, inputs_embeds)
        check_int("chunk", chunk, low=1)
        B, N = inputs.shape[:2]
        positions = self._positions(B, N, inputs.device, fresh=cache is None) if position_ids is None else position_ids
        if tuple(positions.shape[-2:]) != (B, N):
            raise ValueError(f"position_ids: expected [{B}, {N}] or [3, {B}, {N}], got shape {shape_of(positions)}")
        if cache is None:
            cache = new_cache(model)
            self.reset()
        step = N if time is not None else chunk
        for start in range(0, N, max(step, 1)):
            part = slice(start, start + step)
            with self._lock:
                with torch.no_grad(), self.observing(model):
                    output = model(
                        **{name: inputs[:, part]},
                        position_ids=positions[..., part],
                        **{cache_argument(model): cache},
                        use_cache=True,
                        **kwargs,
                    )
                self.update(cache, inputs[:, part].shape[1], time)
                self._next = positions[..., part][..., -1:] + 1
            yield Prefill(cache, output)

    def prefill(self, model: nn.Module, input_ids: Tensor | None = None, **arguments: Any) -> Prefill:
        """Read all tokens as `stream` does; return the cache and the output of the last chunk.

        Raises:
            ValueError: As `stream`, or no tokens.
        """
        last = None
        for last in self.stream(model, input_ids, **arguments):  # noqa: B007
            pass
        if last is None:
            raise ValueError("input_ids: expected at least one token, got none")
        return last

    def generate(
        self,
        model: nn.Module,
        cache: Cache,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Continue from a cache with the model's own `generate`; rows are evicted after every token.

        Args:
            model: A model with `generate`.
            cache: A cache that `prefill` returned.
            input_ids: `[B, N]`, the tokens after those already read, at least one. They are read in one pass.
            position_ids: As in `stream`.
            kwargs: Arguments of `generate`; beams and several answers copy the cache and are not supported.

        Returns:
            The ids `[B, N + answer]` of `generate`. The last id of the answer is not in the cache.

        Raises:
            ValueError: No rows, no tokens, beams, or a request for another kind of cache.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList

        if self.rule is None:
            raise ValueError("cache: expected one that this memory has filled, got none; prefill comes first")
        B, N = input_ids.shape
        if N < 1:
            raise ValueError(f"input_ids: expected [B, N] with at least one token, got shape {shape_of(input_ids)}")
        for name in ("num_beams", "num_return_sequences"):
            if (generation_setting(model, kwargs, name) or 1) > 1:
                raise ValueError(f"{name}: expected 1, because copies of a cache have no memory, got more")
        kind = generation_setting(model, kwargs, "cache_implementation")
        if kind is not None:
            raise ValueError(f"cache_implementation: expected None, because the cache is the one given, got {kind!r}")
        positions = self._positions(B, N, input_ids.device) if position_ids is None else position_ids
        memory, asked = self, kwargs.pop("stopping_criteria", None)

        class Evict(StoppingCriteria):
            """Criterion that `generate` calls once per step, after the pass that wrote the step's rows."""

            def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
                memory.update(cache)
                return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        before = self.seen
        with self._lock, self.observing(model):
            out: Tensor | ModelOutput = cast("Any", model).generate(
                input_ids=input_ids,
                attention_mask=input_ids.new_ones(B, self.token.shape[3] + N),
                position_ids=positions,
                **{cache_argument(model): cache},
                stopping_criteria=StoppingCriteriaList([Evict(), *(asked or [])]),
                **kwargs,
            )
        self._next = positions[..., -1:] + 1 + (self.seen - before - N)
        return out

    def _positions(self, B: int, N: int, device: torch.device, fresh: bool = False) -> Tensor:
        steps = torch.arange(N, device=device)
        if fresh or self._next is None:
            return (steps + (0 if fresh else self.seen)).expand(B, N)
        return self._next + steps
