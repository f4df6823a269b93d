"""Hostile calls of every raw operator, run in a process of their own so that a crash is told by its name.

Good calls are recorded while public functions run, forward and backward; each hostile call is one of them with a few
arguments changed: sizes, dtypes, strides, values, numbers, names. `python -m tests.raw_operators FILE` writes a line
to FILE before each call, and how it ended after it.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vmemory import ops
from vmemory.ops._registry import OPS
from vmemory.reference.bank_layout import RULES, BankLayout
from vmemory.testing import random_tensor

NUMBERS = [-(2**63), -(2**40), -7, -1, 0, 1, 2, 3, 5, 17, 1000, 2**20, 2**31, 2**40, 2**62, 2**63 - 1]
SIZES = [0, 1, 2, 3, 4, 7, 8, 33]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64]
MEMORY = 6 << 30  # bytes a call may ask for
Arguments = list[Any]


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [copied(x) for x in value] if isinstance(value, (list, tuple)) else value


def layouts() -> list[BankLayout]:
    """A memory for every rule, and one without levels whose frames keep a descriptor for each tier."""
    one: dict[str, Any] = {"grid": (4, 4), "dim": 8, "key_dim": 8, "capacities": (3,), "grids": ((4, 4),)}
    two = one | {"key_dim": 4, "capacities": (2, 3), "grids": ((4, 4), (2, 2))}
    levels = {"intervals": (2, 1), "entries": (0, 1)}
    uneven = two | {"grid": (5, 4), "grids": ((3, 4), (2, 2))}
    kinds = [one if rule.victim == "both" else two | levels for rule in RULES.values()]
    return [BankLayout(rule=rule, **kind) for rule, kind in zip(RULES, kinds, strict=True)] + [BankLayout(**uneven)]


def bank_calls(layout: BankLayout) -> None:
    frames, mask = random_tensor(2, 7, *layout.grid, 8), random_tensor(2, 7, *layout.grid) < 0.5
    state = layout.new_state(2, "cpu", torch.float32)
    times = torch.arange(14, dtype=torch.float64).reshape(2, 7)
    for start, streams in ((0, None), (100, None), (200, torch.tensor([1, -1]))):
        cells = None if streams is None else mask
        ops.bank_push_(state, layout, frames, time=times + start, mask=cells, streams=streams)
        victim = ops.bank_decide(state, layout, streams=streams).leaves[:, None].repeat(1, 7, 1)
        ops.bank_push_(state, layout, frames, time=times + start + 50, streams=streams, victim=victim)
    if layout.descriptors == 1:
        for stored in (torch.int8, torch.uint8):
            ops.bank_push_(layout.new_state(2, "cpu", stored), layout, frames)
    frames.requires_grad_()
    for cells in (None, mask):
        plan = ops.bank_plan(frames, layout, mask=cells, time=times)
        ops.bank_gather(frames, plan, layout, mask=cells).slots.sum().backward()


def good_calls() -> None:
    """Public functions on small inputs: every operator, and every way through it."""
    leaf = lambda *shape: random_tensor(*shape).requires_grad_()  # noqa: E731
    for layout in layouts():
        bank_calls(layout)
    for level in ("frame", "token"):
        ops.adjacent_merge(leaf(2, 4, 3, 8), torch.ones(2, 4, 3), level).bank.sum().backward()
        ops.adjacent_similarity(leaf(2, 4, 3, 8), level).sum().backward()
    for causal in (False, True):
        ops.attention_column_sums(leaf(2, 5, 2, 8), leaf(2, 7, 2, 8), causal=causal).sum().backward()
    for activation in ("relu", "gelu", "silu"):
        ops.gated_fusion(*(leaf(*s) for s in ((5, 4), (5, 4), (6, 8), (6,), (4, 6), (4,))), activation).sum().backward()
    for mode in ("area", "bilinear"):
        sum(x.sum() for x in ops.grid_pool(leaf(2, 4, 6, 8), (3, 2), mode, stats=True)).backward()
        ops.grid_pool_ragged(leaf(2, 4, 6, 8), [(3, 2), 1], mode).tokens.sum().backward()
    for mode, size in (("pixel_shuffle_v1", (3, 2)), ("pixel_shuffle_v2", (2, 3)), ("area", (2, 3))):
        ops.grid_pool(leaf(2, 4, 6, 8), size, mode).sum().backward()
    slots, count = random_tensor(2, 4, 3, 8), torch.tensor([1, 9])
    ops.ring_push_(slots, count, random_tensor(2, 5, 3, 8))
    ops.ring_push_(slots, count, random_tensor(1, 1, 3, 8), torch.tensor([1]))
    ops.ring_read(slots, count)
    ops.slot_replace_(slots, count, random_tensor(2, 3, 8))
    for means in (None, random_tensor(2, 4, 8)):
        ops.slot_replace_(slots, count, random_tensor(1, 3, 8), torch.tensor([1]), level="mean", means=means)
    ops.select_tokens(random_tensor(2, 9), 4)
    ops.select_tokens(random_tensor(2, 9), [2, 3], torch.arange(9) // 5)
    rows, keep = leaf(2, 9, 8), ops.select_tokens(random_tensor(2, 9), [2, 3], torch.arange(18).reshape(2, 9) // 5)
    moved = ops.compact(rows, keep.indices, torch.arange(18).reshape(2, 9), leaf(2, 9))
    moved.tokens.sum().backward()
    for bits in (8, 4):
        stored = ops.quantize_slots(random_tensor(2, 9, 8), bits)
        ops.dequantize_slots(*stored)
        ops.dequantize_slots(*stored, rows=torch.tensor([[0, 3, -1], [8, 2, 2]]), dtype=torch.bfloat16)
        ops.similarity_topk(leaf(2, 3, 8), stored.values, 2, scale=stored.scale).values.sum().backward()
    filters = {"count": torch.tensor([5, 9]), "where": random_tensor(2, 9) < 0.5}
    ops.similarity_topk(leaf(2, 3, 8), leaf(2, 9, 8), 2, **filters).values.sum().backward()
    ops.similarity_topk(random_tensor(2, 3, 8), random_tensor(2, 9, 8), 2, norm=torch.ones(2, 9))
    ops.similarity_topk(random_tensor(2, 20, 8), random_tensor(2, 9, 8), 2, metric="dot")
    for queries in (2, 9):
        attended = ops.memory_attention(leaf(2, queries, 2, 8), leaf(2, 4, 3, 2, 8), leaf(2, 4, 3, 2, 8), count)
        attended.sum().backward()
    quantized = [ops.quantize_slots(random_tensor(2, 4, 3, 2, 8)) for _ in range(2)]
    keys, values = (x.values for x in quantized)
    scales = {"key_scale": quantized[0].scale, "value_scale": quantized[1].scale}
    ops.memory_attention(leaf(2, 9, 2, 8), keys, values, count, **scales).sum().backward()
    for size in (None, torch.ones(2, 9, 1)):
        plan = ops.bipartite_match(random_tensor(2, 9, 8), 3, 1)
        merged = ops.token_merge(leaf(2, 9, 8), plan, size)
        ops.token_unmerge(merged.x, plan).sum().backward()
    ops.bipartite_match(random_tensor(4, 5, 8), 2, cls=1, groups=2)


def recorded() -> dict[str, list[Arguments]]:
    """What every operator is called with, as it was before the call."""
    calls: dict[str, list[Arguments]] = {name: [] for name in OPS}
    kept = {name: op.native for name, op in OPS.items()}

    def listen(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name].append(copied(list(args)))
            return kept[name](*args)

        return call

    try:
        for name, op in OPS.items():
            op.native = listen(name)
        good_calls()
    finally:
        for name, op in OPS.items():
            op.native = kept[name]
    return calls


class Mutator:
    """Changes arguments of good calls; the same ones for the same seed."""

    def __init__(self, seed: int, strings: list[str]) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.strings = [*strings, "", "zzz"]

    def call(self, good: Arguments) -> tuple[Arguments, str]:
        """A hostile call, and what was changed in it."""
        args = copied(good)
        what = []
        for k in sorted(self.random.sample(range(len(args)), min(len(args), self.random.choice((1, 1, 1, 2, 3))))):
            args[k] = self.changed(args[k])
            what.append(f"{k}={shown(args[k])}")
        return args, ", ".join(what)

    def changed(self, value: Any) -> Any:
        if value is None or isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.random.choice([*NUMBERS, value - 1, value + 1])
        if isinstance(value, str):
            return self.random.choice(self.strings)
        if isinstance(value, list):
            return self.list(list(value))
        return self.random.choice(DTYPES) if isinstance(value, torch.dtype) else value

    def list(self, value: list[Any]) -> list[Any]:
        change = self.random.choice(("value", "value", "more", "fewer", "none"))
        if change == "none" or not value:
            return []
        k = self.random.randrange(len(value))
        if change == "value":
            value[k] = self.changed(value[k])
        elif change == "more":
            value.insert(k, self.changed(value[k]))
        else:
            del value[k]
        return value

    def tensor(self, value: Tensor | None) -> Tensor | None:
        if value is None:
            shape = [self.random.choice(SIZES) for _ in range(self.random.randrange(5))]
            return self.values(torch.zeros(shape, dtype=self.random.choice(DTYPES)))
        changes = [self.values, self.values, self.values, self.size, self.size, self.strides, self.dtype, self.rank]
        if self.random.random() < 0.1:
            return self.tensor(None)
        return self.random.choice(changes)(value)

    def values(self, x: Tensor) -> Tensor:
        """Some values replaced by extreme ones."""
        x = x.clone()
        if x.numel() == 0:
            return x
        flat = x.view(-1)
        for _ in range(self.random.choice((1, 1, 3, x.numel()))):
            k = self.random.randrange(x.numel())
            if x.dtype == torch.int64:
                number = self.random.choice([*NUMBERS, int(flat[k]) + 1, int(flat[k]) - 1])
                flat[k] = min(max(number, NUMBERS[0]), NUMBERS[-1])
            elif x.dtype.is_floating_point:
                flat[k] = self.random.choice([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, 1e-45])
            elif x.dtype == torch.bool:
                flat[k] = self.random.random() < 0.5
        return x

    def size(self, x: Tensor) -> Tensor:
        """Another size in one dimension."""
        if x.dim() == 0:
            return x.reshape(1)
        d = self.random.randrange(x.dim())
        n = self.random.choice([*SIZES, x.shape[d] + 1, max(0, x.shape[d] - 1)])
        parts = [x] * (n // max(1, x.shape[d]) + 1)
        if x.shape[d] == 0:
            return x.new_zeros([n if k == d else s for k, s in enumerate(x.shape)])
        return torch.cat(parts, d).narrow(d, 0, n).contiguous()

    def strides(self, x: Tensor) -> Tensor:
        """The same shape laid out in another way."""
        if x.dim() == 0 or x.numel() == 0:
            return x
        d = self.random.randrange(x.dim())
        kind = self.random.choice(("expanded", "stepped", "transposed", "offset"))
        if kind == "expanded":
            return x.narrow(d, 0, 1).expand(x.shape)
        if kind == "stepped":
            return (
                torch.stack([x, x], d + 1)
                .flatten(d, d + 1)
                .narrow(d, 0, 2 * x.shape[d])[(slice(None),) * d + (slice(None, None, 2),)]
            )
        if kind == "transposed":
            return x.transpose(d, 0).contiguous().transpose(d, 0)
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    def dtype(self, x: Tensor) -> Tensor:
        return x.to(self.random.choice(DTYPES))

    def rank(self, x: Tensor) -> Tensor:
        if x.dim() and self.random.random() < 0.5:
            return x.flatten(0, min(1, x.dim() - 1)) if self.random.random() < 0.5 else x.flatten()
        return x.unsqueeze(self.random.randrange(x.dim() + 1))


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{'' if value.is_contiguous() else ' strided'}"
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else repr(value)


def hostile_calls(seed: int, rounds: int) -> Iterator[tuple[str, Callable[..., Any], Arguments]]:
    """(name, operator, arguments): the known crashes, then `rounds` changed calls of every operator."""
    good = recorded()
    for name, change in KNOWN.items():
        op = name.split(":")[0]
        yield name, OPS[op].native, change(copied(good[op]))
    strings = sorted({x for calls in good.values() for call in calls for x in call if isinstance(x, str)})
    for op, calls in good.items():
        mutator = Mutator(seed, strings)
        for k in range(rounds):
            args, what = mutator.call(calls[k % len(calls)])
            yield f"{op}: {seed}/{k} {what}", OPS[op].native, args


def setting(index: int, value: Any, call: int = 0) -> Callable[[list[Arguments]], Arguments]:
    """A good call with one argument replaced; `value` may be a function of the old one."""

    def change(calls: list[Arguments]) -> Arguments:
        args = calls[call]
        args[index] = value(args[index]) if callable(value) else value
        return args

    return change


def with_value(index: int, place: int, value: int, call: int = 0) -> Callable[[list[Arguments]], Arguments]:
    """A good call with one element of one tensor replaced."""

    def change(x: Tensor) -> Tensor:
        x.view(-1)[place] = value
        return x

    return setting(index, change, call)


def full(shape: list[int], value: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.int64)


# calls that once wrote or read out of bounds, divided by zero or never came back
KNOWN: dict[str, Callable[[list[Arguments]], Arguments]] = {
    **{f"ring_push_: count {n}": with_value(1, 0, n) for n in (-1, -7, 2**62, 2**63 - 1)},
    **{f"ring_read: count {n}": with_value(1, 0, n) for n in (-1, -7, 2**62, 2**63 - 1)},
    **{f"slot_replace_: count {n}": with_value(1, 0, n) for n in (-1, -7, 2**62, 2**63 - 1)},
    "ring_push_: wide frames": setting(2, torch.randn(2, 3, 300, 80)),
    "ring_push_: frames of another dtype": setting(2, torch.randn(2, 5, 3, 8, dtype=torch.float64)),
    "ring_push_: one counter for many streams": lambda calls: [
        torch.randn(200, 4, 3, 8),
        full([1], 0),
        torch.randn(200, 3, 3, 8),
        None,
    ],
    "ring_push_: counters of 32 bits": setting(1, torch.zeros(2, dtype=torch.int32)),
    "ring_push_: slots that share memory": setting(0, torch.zeros(8).expand(2, 4, 3, 8)),
    "ring_push_: vectors": lambda calls: [torch.randn(8), full([2], 0), torch.randn(8), None],
    "ring_push_: one stream number for many rows": lambda calls: [
        torch.randn(200, 4, 3, 8),
        full([200], 0),
        torch.randn(200, 1, 3, 8),
        full([1], 0),
    ],
    "slot_replace_: small means": setting(2, torch.randn(1, 1, 1), call=2),
    "slot_replace_: means of whole frames": setting(5, "flat", call=2),
    **{f"similarity_topk: k {k}": setting(6, k) for k in (-1, 0, 10**6, 2**40)},
    "similarity_topk: a query of more channels": setting(0, torch.randn(2, 3, 800)),
    "similarity_topk: a short filter": setting(3, torch.ones(2, 1, dtype=torch.bool)),
    "similarity_topk: a short norm": setting(5, torch.ones(2, 1)),
    "similarity_topk: a large count": with_value(2, 0, 10**6, call=2),
    "similarity_topk_backward: a slot that is not there": setting(2, full([2, 3, 2], 10**7)),
    "token_merge: a row that is not there": setting(2, full([2, 9], 10**7)),
    "token_merge: a start past the end": with_value(3, 6, 10**7),
    "token_merge: starts that fall": setting(3, torch.tensor([[9, -5, 4, 1, 2, 3, 9]] * 2)),
    "token_merge: a token without rows": setting(3, torch.tensor([[0, 1, 2, 2, 3, 4, 9]] * 2)),
    "token_merge_backward: a token that is not there": setting(3, full([2, 9], 10**7)),
    "token_unmerge: a token that is not there": setting(1, full([2, 9], 10**7)),
    "token_unmerge: a token below 0": setting(1, full([2, 9], -(10**6))),
    "token_unmerge_backward: a row that is not there": setting(1, full([2, 9], 10**7)),
    **{f"bipartite_match: r {r}": setting(1, r) for r in (-1, 5, 10**9)},
    "bipartite_match: front": setting(2, 10**6),
    "bipartite_match: no group": setting(4, 0),
    "bipartite_match: many groups": setting(4, 10**6),
    "select_tokens: large budgets": setting(1, [2**62, 2**62], call=1),
    "select_tokens: budgets below 0": setting(1, [-5, -5], call=1),
    "select_tokens: a segment that is not there": setting(2, full([9], 10**7), call=1),
    "select_tokens: few segments": setting(2, full([3], 0), call=1),
    "compact: a mask": setting(1, torch.ones(10000, dtype=torch.bool)),
    "compact_backward: a mask": setting(1, torch.ones(10000, dtype=torch.bool)),
    "compact_backward: a length below 0": setting(2, -(2**40)),
    **{f"grid_pool: size {s}": setting(1, s) for s in ([], [2], [0, 0], [-1, -4], [2**31, 2**31], [2**62, 4])},
    "grid_pool: a matrix": setting(0, torch.randn(4, 8)),
    "grid_pool: another mode": setting(2, "zzz"),
    "grid_pool_stats: size []": setting(1, []),
    "grid_pool_backward: large cells": setting(1, full([2, 2, 2, 8], 10**7)),
    "grid_pool_backward: grid []": setting(2, []),
    "grid_pool_ragged: sizes of other frames": setting(1, [2, 2]),
    "grid_pool_ragged: sizes that overflow": setting(1, [2**31, 2**31, 2**31, 2**31]),
    "dequantize_slots: a row that is not there": setting(2, full([2, 3], 10**7), call=1),
    "dequantize_slots: many channels": setting(3, 8000),
    "quantize_slots: 5 bits": setting(1, 5),
    "memory_attention: a large count": setting(3, full([2], 10**7)),
    "memory_attention: keys of more channels": setting(1, torch.randn(2, 4, 3, 2, 80)),
    "memory_attention: values without slots": setting(2, torch.randn(2, 4)),
    "adjacent_merge: few sizes": setting(1, torch.ones(1)),
    "adjacent_merge_backward: a place that is not there": setting(2, full([2, 1], 10**7)),
    "attention_column_sums: keys of more channels": setting(1, torch.randn(2, 600, 2, 80)),
    "gated_fusion: small weights": setting(2, torch.randn(1, 1)),
    **{f"bank_push_: order {n}": with_value(7, 0, n, call=2) for n in (-1, 7, 10**6, 2**40)},
    **{f"bank_push_: length {n}": with_value(8, 3, n, call=2) for n in (-5, -1, 7, 100, 10**6, 2**40)},
    **{f"bank_push_: seen {n}": with_value(8, 0, n, call=2) for n in (-1, 2**62, 2**63 - 1)},
    "bank_push_: large tiers": setting(16, [2**31, 3]),
    "bank_push_: a tier below 0": setting(16, [-2, 3]),
    "bank_push_: an empty tier": setting(16, [0, 3]),
    "bank_push_: an interval of 0": setting(18, [0, 1]),
    "bank_push_: a tier that is not there": setting(19, [0, 7]),
    "bank_push_: small maps": setting(15, torch.zeros(1)),
    "bank_push_: larger frames": setting(10, torch.randn(2, 3, 40, 40, 80)),
    "bank_push_: nine tiers": lambda calls: [*calls[0][:16], [1] * 9, [1, 1] * 9, *calls[0][18:]],
    "bank_push_: few times": setting(11, torch.zeros(1, dtype=torch.float64)),
    "bank_push_: a stream that is not there": setting(13, torch.tensor([5, 2**62]), call=4),
    "bank_gather: slots that are not there": setting(3, full([2, 7], 10**6)),
    "bank_gather: frames that are not there": setting(4, full([2, 5, 4], 10**6)),
    "bank_gather: frames of a deeper tier": setting(3, full([2, 7], 0)),
    "bank_gather_backward: slots that are not there": setting(3, full([2, 7], 10**6)),
    "bank_plan: small maps": setting(3, torch.zeros(1)),
    "bank_plan: many channels": setting(10, 8000),
    "bank_plan: other descriptors": setting(9, 7),
}


def changed_in_place(op: Any, args: Arguments) -> list[Tensor]:
    """The tensors that the operator may change."""
    marked = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    return [x for x, written in zip(args, marked, strict=False) if written and isinstance(x, Tensor)]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=60, help="hostile calls of each operator")
    parser.add_argument("--unlimited", action="store_true", help="leave memory to the sanitizer")
    options = parser.parse_args()
    if not options.unlimited:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)
    with open(options.log, "w", buffering=1) as log:
        for name, op, args in hostile_calls(options.seed, options.rounds):
            print(name, end="\t", file=log, flush=True)
            written = changed_in_place(op, args)
            before = copied(written)
            try:
                op(*args)
                print("ran", file=log)
            except Exception as error:
                half = "" if all(map(same, written, before)) else " AFTER A CHANGE"
                print(f"refused{half}: {' '.join(str(error).split())[:200]}", file=log)


if __name__ == "__main__":
    sys.exit(main())
