"""Time one frame into memories of fixed slots against lists of frames and the best eager form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.peers.list_memory import EpisodicMemory, WorkingMemory, replace_
from benchmarks.timing import Rotation
from vmemory.ops import ring_push_, ring_read, slot_replace_
from vmemory.reference import ring as reference
from vmemory.testing import random_tensor

SLOTS, TOKENS, CHANNELS, STEPS = 32, 196, 896, 40


def filled(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    slots = random_tensor(1, SLOTS, TOKENS, CHANNELS, dtype=dtype, device=device, seed=1)
    return slots, torch.full((1,), SLOTS, dtype=torch.int64, device=device)


def write_next_(rows: Tensor, written: Tensor, frame: Tensor) -> None:
    """Write a frame `[1, N, D]` to the next slot, counted on the device, so that one graph serves all frames."""
    rows.index_copy_(0, written % SLOTS, frame)
    written += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.benchmark(group="ring_push_: one frame 196×896 into 32 slots")
def test_push(measure, device, dtype):
    """Time a write; the list is concatenated with `torch.cat`, because its users need one tensor."""
    frames = random_tensor(STEPS, 1, TOKENS, CHANNELS, dtype=dtype, device=device)
    slots, count = filled(device, dtype)
    memory = WorkingMemory(SLOTS)
    for x in frames:
        ring_push_(slots, count, x[None])
        expected = memory.push(x)
    assert torch.equal(ring_read(slots, count).frames[0], expected)
    rows = random_tensor(SLOTS, TOKENS, CHANNELS, dtype=dtype, device=device)
    moved = 2 * x.numel() * x.element_size()

    def ours(clip: Tensor) -> None:
        for t in range(STEPS):
            ring_push_(slots, count, clip[t : t + 1])

    def listed(clip: Tensor) -> None:
        for t in range(STEPS):
            memory.push(clip[t])

    def eager(clip: Tensor) -> None:
        for t in range(STEPS):
            rows[t % SLOTS].copy_(clip[t, 0])

    torch._dynamo.reset()
    write, written = torch.compile(write_next_, dynamic=False), torch.zeros(1, dtype=torch.int64, device=device)

    def compiled(clip: Tensor) -> None:
        for t in range(STEPS):
            write(rows, written, clip[t])

    name = str(dtype).removeprefix("torch.")
    measure(name, ours, Rotation(frames), moved, 0.0, calls=STEPS, list=listed, eager=eager, compile=compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.benchmark(group="ring_read: 32 slots of 196×896, oldest first")
def test_read(measure, device, dtype):
    """Time a read; eager PyTorch needs the count on the host to roll the slots."""
    slots, count = filled(device, dtype)
    count += 11

    def eager(x: Tensor) -> Tensor:
        return x.roll(-(int(count[0]) % SLOTS), 1)

    assert torch.equal(ring_read(slots, count).frames, eager(slots))
    torch._dynamo.reset()
    compiled = torch.compile(reference.ring_read, dynamic=False)
    moved = 2 * slots.numel() * slots.element_size()
    measure(
        str(dtype).removeprefix("torch."),
        lambda x: ring_read(x, count).frames,
        Rotation(slots),
        moved,
        0.0,
        eager=eager,
        compile=lambda x: compiled(x, count)[0],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["flat", "mean", "mean, kept"])
@pytest.mark.benchmark(group="slot_replace_: one frame 196×896 into 32 full slots")
def test_replace(measure, device, dtype, variant):
    level = variant.split(",")[0]
    slots, count = filled(device, dtype)
    means = slots.float().mean(2) if variant == "mean, kept" else None
    own, episodic = slots[0].clone(), EpisodicMemory(SLOTS)
    for x in slots[0]:
        episodic.push(x)
    frames = random_tensor(STEPS, 1, TOKENS, CHANNELS, dtype=dtype, device=device, seed=2) + 0.1 * slots[0, 7]
    for x in frames:
        place = slot_replace_(slots, count, x, level=level, means=means)
        if dtype == torch.float32:
            assert torch.equal(place, replace_(own, x[0], level))
            assert level == "mean" or place.item() == episodic.push(x[0])
    size = x.numel() * x.element_size()
    read = size if means is not None else SLOTS * size

    def ours(clip: Tensor) -> None:
        for t in range(STEPS):
            slot_replace_(slots, count, clip[t], level=level, means=means)

    def eager(clip: Tensor) -> None:
        for t in range(STEPS):
            replace_(own, clip[t, 0], level)

    def listed(clip: Tensor) -> None:
        for t in range(STEPS):
            episodic.push(clip[t, 0])

    torch._dynamo.reset()
    replace = torch.compile(replace_, dynamic=False)

    def compiled(clip: Tensor) -> None:
        for t in range(STEPS):
            replace(own, clip[t, 0], level)

    others = {"eager": eager, "compile": compiled} | ({"list": listed} if level == "flat" else {})
    flops = read / x.element_size() * 4.0
    name = f"{variant} {str(dtype).removeprefix('torch.')}"
    measure(name, ours, Rotation(frames), read + 2 * size, flops, calls=STEPS, **others)
