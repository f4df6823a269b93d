"""Every operator gives the same bits when called again; forward also with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import vmemory.ops
from vmemory import ops
from vmemory.reference.bank_layout import BankLayout, BankState
from vmemory.testing import random_tensor

pytestmark = pytest.mark.usefixtures("native")

LAYOUT = BankLayout((8, 8), 96, 96, (3, 4, 6), ((8, 8), (4, 4), (2, 2)))


def tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors(part)


def pushed(frames: Tensor) -> BankState:
    state = LAYOUT.new_state(frames.shape[0], "cpu", frames.dtype)
    ops.bank_push_(state, LAYOUT, frames)
    return state


def decided(frames: Tensor) -> object:
    return ops.bank_decide(pushed(frames), LAYOUT)


def ring(frames: Tensor) -> object:
    slots, count = torch.zeros(frames.shape[0], 5, *frames.shape[2:]), torch.zeros(frames.shape[0], dtype=torch.int64)
    ops.ring_push_(slots, count, frames)
    return slots, count


def replaced(frames: Tensor) -> object:
    slots, count = ring(frames)
    return [ops.slot_replace_(slots, count, frames[:, t], level="flat") for t in range(frames.shape[1])], slots, count


def attended(x: Tensor) -> Tensor:
    return ops.memory_attention(x[:, 0], x, x.flip(-1), torch.tensor([5, 7]))


def gathered(frames: Tensor) -> object:
    return ops.bank_gather(frames, ops.bank_plan(frames, LAYOUT), LAYOUT)


def dequantized(x: Tensor) -> Tensor:
    return ops.dequantize_slots(*ops.quantize_slots(x, 4), rows=torch.arange(900).flip(0).expand(len(x), -1))


def fused(x: Tensor) -> Tensor:
    first, second = random_tensor(80, 2 * x.shape[-1], seed=1), random_tensor(x.shape[-1], 80, seed=2)
    return ops.gated_fusion(x, x.flip(0), first, first[:, 0], second, second[:, 0])


def merged(x: Tensor) -> object:
    return ops.token_merge(x, ops.bipartite_match(x.detach(), x.shape[1] // 4))


# the shape of an input, large enough that a second thread is worth waking, and what is done with it
CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]] = {
    "adjacent_merge": ((2, 9, 200, 300), lambda x: ops.adjacent_merge(x, torch.ones(x.shape[:3]))),
    "adjacent_similarity": ((2, 30, 64, 200), ops.adjacent_similarity),
    "attention_column_sums": ((2, 150, 3, 40), lambda x: ops.attention_column_sums(x, x.flip(-1))),
    "bank_decide": ((2, 40, 8, 8, 96), decided),
    "bank_gather": ((2, 40, 8, 8, 96), gathered),
    "bank_plan": ((2, 40, 8, 8, 96), lambda x: ops.bank_plan(x, LAYOUT)),
    "bank_push_": ((2, 40, 8, 8, 96), pushed),
    "bipartite_match": ((2, 900, 64), lambda x: ops.bipartite_match(x, 200)[:3]),
    "compact": ((2, 4000, 100), lambda x: ops.compact(x, torch.arange(3999, -1, -3).expand(2, -1)).tokens),
    "dequantize_slots": ((2, 1500, 300), dequantized),
    "gated_fusion": ((500, 200), fused),
    "grid_pool": ((40, 12, 12, 100), lambda x: ops.grid_pool(x, (5, 7))),
    "grid_pool_ragged": ((40, 8, 8, 200), lambda x: ops.grid_pool_ragged(x, [8, 4, 3, 1] * 10).tokens),
    "memory_attention": ((2, 7, 60, 3, 40), attended),
    "quantize_slots": ((2, 1500, 300), ops.quantize_slots),
    "ring_push_": ((2, 9, 100, 300), ring),
    "ring_read": ((2, 9, 100, 300), lambda x: ops.ring_read(*ring(x))),
    "select_tokens": ((3, 300_000), lambda x: ops.select_tokens(x, 70_001)),
    "similarity_topk": ((2, 5000, 100), lambda x: ops.similarity_topk(x[:, :70], x, 9)),
    "slot_replace_": ((2, 9, 100, 300), replaced),
    "token_merge": ((2, 2000, 200), merged),
    "token_unmerge": (
        (2, 2000, 200),
        lambda x: ops.token_unmerge(merged(x).x, ops.bipartite_match(x.detach(), x.shape[1] // 4)),
    ),
}
# what is compared or counted has no gradient
DECISIONS = {"bank_decide", "bank_plan", "bank_push_", "bipartite_match", "dequantize_slots", "quantize_slots",
             "ring_push_", "ring_read", "select_tokens", "slot_replace_"}  # fmt: skip


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_every_public_operator_is_called():
    assert set(CALLS) == {name for name in vmemory.ops.__all__ if hasattr(getattr(vmemory.ops, name), "backends")}


@pytest.mark.parametrize("name", CALLS)
def test_results_depend_on_neither_call_nor_threads(name):
    shape, call = CALLS[name]
    x, results = random_tensor(*shape), []
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        results.append(list(tensors(call(x))))
    for other in results[1:]:
        assert_equal(results[0], other)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in DECISIONS])
def test_gradients_do_not_depend_on_the_call(name):
    shape, call = CALLS[name]
    torch.set_num_threads(2)
    grads = []
    for _ in range(2):
        x = random_tensor(*shape).requires_grad_()
        out = [y for y in tensors(call(x)) if y.requires_grad]
        grads.append(list(torch.autograd.grad(out, x, [random_tensor(*y.shape, seed=3).to(y.dtype) for y in out])))
    assert_equal(*grads)
