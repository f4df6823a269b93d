"""Elements past 2³¹ on the CPU, in mappings of which only the touched pages are ever in memory.

Left out is what cannot be had in little memory: `ring_read`, `quantize_slots` and gradients of a whole memory write as
much as they span, `select_tokens` scores every token.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vmemory.ops import (
    MergePlan,
    adjacent_similarity,
    bank_gather,
    bank_plan,
    bank_push_,
    compact,
    dequantize_slots,
    grid_pool,
    memory_attention,
    quantize_slots,
    ring_push_,
    similarity_topk,
    slot_replace_,
    token_merge,
    token_unmerge,
)
from vmemory.reference.bank_layout import BankLayout, BankState
from vmemory.testing import random_tensor

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs mappings that reserve nothing"),
    pytest.mark.usefixtures("native", "little_memory"),
]

BEYOND, WIDE = 2**31, 2**16
# rows of WIDE elements: from row ROWS - 8 on they lie past 2^31 elements
ROWS = BEYOND // WIDE + 8
_MAP_NORESERVE = 0x4000  # a constant of the mmap module from Python 3.13 on


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resident()
    yield
    assert resident() - before < 1 << 29


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros; reading them takes no memory, writing one takes its page."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags)
    except OSError as error:
        pytest.skip(f"the system maps no memory it does not have: {error}")
    return torch.frombuffer(mapping, dtype=dtype).view(shape)


def rows_beyond(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random_tensor(n, WIDE, dtype=dtype, seed=n)


def stored_rows(n: int, stored: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of WIDE elements and, for integers, their scales."""
    if stored == torch.bfloat16:
        return rows_beyond(n), None
    in_8_bits = stored == torch.int8
    return quantize_slots(random_tensor(n, WIDE if in_8_bits else 2 * WIDE, seed=n), 8 if in_8_bits else 4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.uint8])
def test_similarity_topk_reads_the_rows_it_is_let_read(stored):
    memory, where, scale = sparse(1, ROWS, WIDE, dtype=stored), torch.zeros(1, ROWS, dtype=torch.bool), None
    chosen = [3, ROWS - 6, ROWS - 1]
    rows, factor = stored_rows(3, stored)
    memory[0, chosen], where[0, chosen] = rows, True
    if factor is not None:
        scale = torch.ones(1, ROWS)
        scale[0, chosen] = factor
    plain = rows if factor is None else dequantize_slots(rows, factor)
    results = []
    few = None if factor is None else factor[None]
    for place, arguments in ((memory, {"where": where, "scale": scale}), (rows[None], {"scale": few})):
        query = plain.flip(0)[None].clone().requires_grad_()
        found = similarity_topk(query, place, 3, **arguments)
        found.values.backward(random_tensor(1, 3, 3))
        results.append((found.values.detach(), found.indices, query.grad))
    (values, indices, grad), (expected, order, expected_grad) = results
    assert indices[0, :, 0].tolist() == chosen[::-1]
    assert torch.equal(indices, torch.tensor(chosen)[order])
    assert torch.equal(values, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8])
def test_dequantize_slots_brings_back_chosen_rows(stored):
    values, scale = sparse(1, ROWS, WIDE, dtype=stored), torch.ones(1, ROWS)
    rows, factor = stored_rows(3, stored)
    chosen = torch.tensor([[ROWS - 1, 5, ROWS - 7]])
    values[0, chosen[0]], scale[0, chosen[0]] = rows, factor
    assert torch.equal(dequantize_slots(values, scale, rows=chosen)[0], dequantize_slots(rows, factor))


def test_compact_gathers():
    tokens, keep = sparse(1, ROWS, WIDE, dtype=torch.bfloat16), torch.tensor([[ROWS - 1, 0, ROWS - 8, -1]])
    rows = rows_beyond(3)
    tokens[0, keep[0, :3]] = rows
    moved = compact(tokens, keep, torch.arange(ROWS)[None])
    assert torch.equal(moved.tokens[0, :3], rows)
    assert not moved.tokens[0, 3].any()
    assert torch.equal(moved.companions[0], keep)


def test_ring_push_writes_the_slot_it_should():
    slots, count = sparse(1, ROWS, 2, WIDE // 2, dtype=torch.bfloat16), torch.tensor([3 * ROWS - 2])
    frames = rows_beyond(3).view(1, 3, 2, WIDE // 2)
    ring_push_(slots, count, frames)
    assert count.item() == 3 * ROWS + 1
    assert torch.equal(slots[0, [ROWS - 2, ROWS - 1, 0]], frames[0])
    # where an offset of 32 bits would have come out
    assert not slots[0, [ROWS - 3, 1, 2, 5, 6, 7]].any()


@pytest.mark.parametrize("level", ["flat", "mean"])
def test_slot_replace_finds_and_writes_the_slot_it_should(level):
    slots, count = sparse(1, ROWS, WIDE // 64, 64, dtype=torch.bfloat16), torch.tensor([ROWS])
    means = torch.zeros(1, ROWS, 64) if level == "mean" else None
    old = rows_beyond(1).view(1, -1, 64)
    new = old + 0.1 * rows_beyond(2)[:1].view(1, -1, 64)
    slots[0, ROWS - 5] = old[0]
    if means is not None:
        means[0, ROWS - 5] = old.float().mean(1)
    assert slot_replace_(slots, count, new, level=level, means=means).item() == ROWS - 5
    assert torch.equal(slots[0, ROWS - 5], new[0])
    assert not slots[0, [ROWS - 6, ROWS - 4, 3]].any()


def test_bank_push_writes_the_stream_it_should():
    layout = BankLayout((8, 8), WIDE // 64, 8, (1,), ((8, 8),), "recent")
    shapes = layout.state_shapes(ROWS, torch.bfloat16)
    slots = sparse(*shapes["slots"][0], dtype=torch.bfloat16)
    small = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in shapes.items() if name != "slots"}
    state = BankState(slots=slots, **small)
    state.entry.fill_(-1)
    state.order.fill_(-1)
    frames = rows_beyond(2).view(2, 1, 8, 8, -1)
    bank_push_(state, layout, frames, streams=torch.tensor([ROWS - 1, ROWS - 4]))
    for stream, frame in ((ROWS - 1, frames[0, 0]), (ROWS - 4, frames[1, 0])):
        assert torch.equal(slots[stream], frame.flatten(0, 1))
        assert state.entry[stream, 0, 0] == 0
    assert not slots[[ROWS - 2, 7, 4]].any()


def test_a_video_is_planned_and_gathered():
    layout = BankLayout((8, 8), WIDE // 64, WIDE // 64, (1, 2), ((8, 8), (4, 4)), "paper")
    frames = sparse(1, ROWS, 8, 8, WIDE // 64, dtype=torch.bfloat16)
    tail = rows_beyond(3).view(3, 8, 8, -1)
    frames[0, -3:] = tail
    plan = bank_plan(frames, layout)
    assert plan.assign[0, -1] >= 0
    slots = bank_gather(frames, plan, layout).slots
    first = layout.row_of(int(plan.assign[0, -1]))
    assert torch.equal(slots[0, first : first + 64], tail[-1].flatten(0, 1))


def test_token_merge_and_unmerge_address_rows():
    x = sparse(1, ROWS, WIDE, dtype=torch.bfloat16)
    last = rows_beyond(2)
    x[0, [ROWS - 1, ROWS - 7]] = last
    others = torch.tensor([i for i in range(ROWS) if i not in (ROWS - 1, ROWS - 7)])
    order = torch.cat([torch.tensor([ROWS - 1, ROWS - 7]), others])[None]
    place = torch.full((1, ROWS), 1)
    place[0, ROWS - 1] = 0
    merged = token_merge(x, MergePlan(place, order, torch.tensor([[0, 1, ROWS]]), 1))
    assert merged.size.flatten().tolist() == [1, ROWS - 1]
    assert torch.equal(merged.x[0, 0], last[0])
    assert torch.equal(merged.x[0, 1], (last[1].float() * (1 / (ROWS - 1))).bfloat16())
    place = torch.tensor([[ROWS - 1, 0, ROWS - 7]])
    start = torch.zeros(1, ROWS + 1, dtype=torch.int64)
    spread = token_unmerge(x, MergePlan(place, place, start, 1))
    assert torch.equal(spread[0, [0, 2]], last)
    assert not spread[0, 1].any()


@pytest.mark.parametrize("bits", [16, 8])
def test_memory_attention_reaches_the_second_stream(bits):
    kind = torch.bfloat16 if bits == 16 else torch.int8
    slots = sparse(2, ROWS, WIDE // 128, 1, 128, dtype=kind)
    slot = random_tensor(WIDE // 128, 1, 128, dtype=torch.bfloat16)
    scales, few = {}, {}
    if bits == 8:
        slot, factor = quantize_slots(slot)
        scale = sparse(2, ROWS, WIDE // 128, 1, dtype=torch.float32)
        scale[1, 0] = factor
        scales, few = ({"key_scale": s, "value_scale": s} for s in (scale, factor[None, None]))
    slots[1, 0] = slot
    query = random_tensor(2, 9, 1, 128, dtype=torch.bfloat16, seed=1).requires_grad_()
    out = memory_attention(query, slots, slots, torch.tensor([0, 1]), **scales)
    alone = query.detach()[1:].requires_grad_()
    expected = memory_attention(alone, slot[None, None], slot[None, None], torch.tensor([1]), **few)
    assert torch.equal(out[1:], expected)
    assert not out[0].any()
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(query.grad[1:], alone.grad)


def test_passes_over_many_frames():
    frames = sparse(1, ROWS, 8, 8, WIDE // 64, dtype=torch.bfloat16)
    tail = rows_beyond(2).view(2, 8, 8, -1)
    frames[0, -2:] = tail
    assert torch.equal(grid_pool(frames[0], 1)[-2:], grid_pool(tail, 1))
    similarity = adjacent_similarity(frames.flatten(2, 3), "frame")
    assert torch.equal(similarity[0, -1:], adjacent_similarity(tail.flatten(1, 2)[None], "frame")[0])
    assert not similarity[0, :-1].any()
