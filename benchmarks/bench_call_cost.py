"""Time the Python side of every public operator against its bare launcher, on one small input."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vmemory.ops
from vmemory.ops.bank import layout_maps
from vmemory.reference.bank_layout import BankLayout
from vmemory.testing import random_tensor

CALLS = 100


class Call(NamedTuple):
    """An operator as users call it and as its kernel is launched, on a tensor that may require a gradient."""

    public: Callable[[Tensor], Any]
    bare: Callable[[Tensor], Any]
    x: Tensor


def launchers(like: Tensor) -> SimpleNamespace:
    """Return the launchers that `impl="auto"` picks on a tensor's device, by the name of the public operator."""
    stored = {"dequantize_slots": like.to(torch.int8)}
    picked = {name: getattr(vmemory.ops, name).backends.pick(stored.get(name, like)) for name in PUBLIC}
    spaces = {"native": torch.ops.vmemory, "triton": torch.ops.vmemory_triton}
    return SimpleNamespace(**{name: getattr(spaces[impl], name) for name, impl in picked.items()})


def calls(device: str = "cpu") -> dict[str, Call]:
    """Return one call for each public operator."""
    ops, tokens = vmemory.ops, random_tensor(1, 2, 4, 8, device=device)
    native = launchers(tokens)
    grid = random_tensor(1, 2, 2, 8, device=device)
    bank, size = random_tensor(1, 3, 2, 8, device=device), torch.ones(1, 3, 2, device=device)
    slots, count = random_tensor(1, 2, 4, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    scores, keep = random_tensor(1, 4, device=device), torch.tensor([[0, 2]], device=device)
    rows, memory = random_tensor(1, 4, 8, device=device), random_tensor(1, 5, 8, device=device)
    pair, weights = random_tensor(2, 3, 4, device=device), [random_tensor(*s, device=device) for s in GATE]
    layout = BankLayout(grid=(2, 2), dim=8, key_dim=8, capacities=(2,), grids=((2, 2),))
    frames = random_tensor(1, 1, 2, 2, 8, device=device)
    maps, state = layout_maps(layout, frames), layout.new_state(1, device, torch.float32)
    plan, fixed = ops.bank_plan(frames, layout, maps=maps), layout.kernel_args
    decided = state.norm, state.link, state.entry, state.order, state.counter
    planned = None, plan.pooled, plan.assign, plan.entry, maps
    merging, fewer = ops.bipartite_match(rows, 1), random_tensor(1, 3, 8, device=device)
    queries, kept = random_tensor(1, 4, 2, 8, device=device), random_tensor(1, 2, 4, 2, 8, device=device)
    quantized = ops.quantize_slots(rows)
    return {
        "adjacent_merge": Call(
            lambda x: ops.adjacent_merge(x, size), lambda x: native.adjacent_merge(x, size, "frame"), bank
        ),
        "adjacent_similarity": Call(ops.adjacent_similarity, lambda x: native.adjacent_similarity(x, "frame"), tokens),
        "attention_column_sums": Call(
            lambda x: ops.attention_column_sums(x, queries),
            lambda x: native.attention_column_sums(x, queries, False),
            queries,
        ),
        "bank_decide": Call(
            lambda x: ops.bank_decide(state, layout),
            lambda x: native.bank_decide(*decided, None, None, *fixed),
            frames,
        ),
        "bank_gather": Call(
            lambda x: ops.bank_gather(x, plan, layout, maps=maps),
            lambda x: native.bank_gather(x, *planned, *fixed),
            frames,
        ),
        "bank_plan": Call(
            lambda x: ops.bank_plan(x, layout, maps=maps),
            lambda x: native.bank_plan(
                x, None, None, maps, *fixed, layout.descriptors, layout.key_dim, layout.pooled_cells
            ),
            frames,
        ),
        "bank_push_": Call(
            lambda x: ops.bank_push_(state, layout, x, maps=maps),
            lambda x: native.bank_push_(*state, x, None, None, None, None, maps, *fixed),
            frames,
        ),
        "bipartite_match": Call(
            lambda x: ops.bipartite_match(x, 1), lambda x: native.bipartite_match(x, 1, 0, 0, 1), rows
        ),
        "compact": Call(lambda x: ops.compact(x, keep), lambda x: native.compact([x], keep), rows),
        "dequantize_slots": Call(
            lambda x: ops.dequantize_slots(*quantized),
            lambda x: native.dequantize_slots(*quantized, None, 8, torch.float32),
            rows,
        ),
        "gated_fusion": Call(
            lambda x: ops.gated_fusion(x, pair[1], *weights),
            lambda x: native.gated_fusion(x, pair[1], *weights, "relu", x.requires_grad),
            pair[0],
        ),
        "grid_pool": Call(lambda x: ops.grid_pool(x, 1), lambda x: native.grid_pool(x, (1, 1), "area"), grid),
        "grid_pool_ragged": Call(
            lambda x: ops.grid_pool_ragged(x, [1]), lambda x: native.grid_pool_ragged(x, [1, 1], "area"), grid
        ),
        "memory_attention": Call(
            lambda x: ops.memory_attention(x, kept, kept, count),
            lambda x: native.memory_attention(x, kept, kept, count, None, None, False),
            queries,
        ),
        "quantize_slots": Call(ops.quantize_slots, lambda x: native.quantize_slots(x, 8), rows),
        "ring_push_": Call(
            lambda x: ops.ring_push_(slots, count, x), lambda x: native.ring_push_(slots, count, x, None), tokens
        ),
        "ring_read": Call(lambda x: ops.ring_read(x, count), lambda x: native.ring_read(x, count), slots),
        "select_tokens": Call(lambda x: ops.select_tokens(x, 2), lambda x: native.select_tokens(x, [2], None), scores),
        "similarity_topk": Call(
            lambda x: ops.similarity_topk(x, memory, 2),
            lambda x: native.similarity_topk(x, memory, None, None, None, None, 2, "cosine"),
            rows,
        ),
        "slot_replace_": Call(
            lambda x: ops.slot_replace_(slots, count, x),
            lambda x: native.slot_replace_(slots, count, None, x, None, "flat"),
            tokens[:, 0],
        ),
        "token_merge": Call(
            lambda x: ops.token_merge(x, merging),
            lambda x: native.token_merge(x, None, merging.order, merging.start),
            rows,
        ),
        "token_unmerge": Call(
            lambda x: ops.token_unmerge(x, merging), lambda x: native.token_unmerge(x, merging.place), fewer
        ),
    }


GATE = [(3, 8), (3,), (4, 3), (4,)]
PUBLIC = [name for name in vmemory.ops.__all__ if hasattr(getattr(vmemory.ops, name), "backends")]
STATE = (
    "bipartite_match",
    "dequantize_slots",
    "quantize_slots",
    "bank_decide",
    "bank_plan",
    "bank_push_",
    "ring_push_",
    "ring_read",
    "select_tokens",
    "slot_replace_",
)


def repeat(function: Callable[[Tensor], Any], tracked: bool) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        with torch.set_grad_enabled(tracked):
            for _ in range(CALLS):
                function(x)

    return run


def compare(name: str, tracked: bool, measure: Callable[..., None], benchmark: Any, device: str) -> None:
    call = calls(device)[name]
    x = call.x.clone().requires_grad_(tracked)
    launch = repeat(call.bare, False)
    measure(name, repeat(call.public, tracked), lambda: x, x.numel() * x.element_size(), 0.0, CALLS, launcher=launch)
    info = benchmark.extra_info
    info["python_us"] = info["best_ms"] * 1e3 * (1 - info["launcher_over_ours_best"])


@pytest.mark.benchmark(group="call cost, without gradient")
@pytest.mark.parametrize("name", PUBLIC)
def test_without_gradient(name, measure, benchmark, device):
    compare(name, False, measure, benchmark, device)


@pytest.mark.benchmark(group="call cost, with gradient")
@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in STATE])
def test_with_gradient(name, measure, benchmark, device):
    compare(name, True, measure, benchmark, device)
