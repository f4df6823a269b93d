"""Time the tiered memory: frames one by one, a clip at once, many streams in one call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.peers.hierarchical_bank import HierarchicalMemoryBank
from benchmarks.timing import Rotation
from vmemory.ops.bank import bank_gather, bank_plan, bank_push_, layout_maps
from vmemory.reference.bank_layout import BankLayout, BankState
from vmemory.testing import random_tensor

CAPACITIES, CELLS = (24, 24, 144), (256, 64, 16)
Run = Callable[[Tensor], object]


def layout_of(frames: Tensor, capacities: tuple[int, ...] = CAPACITIES) -> BankLayout:
    H, W, D = frames.shape[-3:]
    grids = tuple((H >> level, W >> level) for level in range(3))
    return BankLayout((H, W), D, D, capacities, grids, "videochat-online")


def peer_of(capacities: tuple[int, ...] = CAPACITIES) -> Run:
    """Return a function that pushes frames `[T, H, W, D]` one by one into the original bank, with channels first."""

    def run(frames: Tensor) -> HierarchicalMemoryBank:
        bank = HierarchicalMemoryBank(capacities, CELLS)
        for index, frame in enumerate(frames.permute(0, 3, 1, 2)):
            bank.update_memory(frame[None], index)
        return bank

    return run


def ours_of(layout: BankLayout, maps: Tensor, impl: str = "auto") -> Run:
    """Return a function that pushes frames `[T, H, W, D]` one by one into a new memory."""

    def run(frames: Tensor) -> BankState:
        state = layout.new_state(1, frames.device, frames.dtype)
        for t in range(len(frames)):
            bank_push_(state, layout, frames[None, t : t + 1], maps=maps, impl=impl)
        return state

    return run


def listed(layout: BankLayout, state: BankState) -> list[list[int]]:
    out = []
    for first, capacity in zip(layout.first_slot, layout.capacities, strict=True):
        slots = [slot for slot in state.order[0, first : first + capacity].tolist() if slot >= 0]
        out.append(state.entry[0, slots, 0].tolist())
    return out


def check_peer(frames: Tensor, capacities: tuple[int, ...], impl: str) -> None:
    """Check that our memory and the original hold the same frames in order, with equal tokens up to rounding."""
    layout = layout_of(frames, capacities)
    state, bank = ours_of(layout, layout_maps(layout, frames), impl)(frames), peer_of(capacities)(frames)
    assert listed(layout, state) == [[entry["index"] for entry in group.entries] for group in bank.groups]
    numbers = state.entry[0, :, 0].tolist()
    for tier, group in enumerate(bank.groups):
        for entry in group.entries:
            row = layout.row_of(numbers.index(entry["index"]))
            got = state.slots[0, row : row + layout.cells[tier]]
            want = entry["tokens"][0].flatten(1).T
            torch.testing.assert_close(got, want, rtol=0, atol=float(8 * torch.finfo(got.dtype).eps * want.abs().max()))


def video(frames: int, side: int, dim: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return frames `[T, side, side, dim]` that drift and sometimes jump."""
    steps = random_tensor(frames, 1, 1, dim, device=device).cumsum(0) * 0.2
    scenes = random_tensor(frames // 50 + 1, side, side, dim, device=device, seed=1)
    return (steps + scenes[torch.arange(frames) // 50]).to(dtype)


class Pieces:
    """Consecutive pieces of a long video; each use takes the next piece, which is no longer in a cache."""

    def __init__(self, frames: Tensor, steps: int) -> None:
        self._pieces, self._at = frames.split(steps), -1

    def __call__(self) -> Tensor:
        self._at = (self._at + 1) % len(self._pieces)
        return self._pieces[self._at]


@pytest.mark.benchmark(group="bank: one frame into a full memory")
def test_one_by_one(measure, benchmark, device):
    frames, steps = video(600, 16, 1152, device), 50
    check_peer(video(120, 16, 48, device), (4, 4, 12), "reference")
    check_peer(frames, CAPACITIES, "auto")
    layout, size = layout_of(frames), frames[0].numel() * frames.element_size()
    maps = layout_maps(layout, frames)
    state, bank = ours_of(layout, maps)(frames), peer_of()(frames)

    def ours(x: Tensor) -> None:
        for t in range(steps):
            bank_push_(state, layout, x[None, t : t + 1], maps=maps)

    def peer(x: Tensor) -> None:
        for frame in x.permute(0, 3, 1, 2):
            bank.update_memory(frame[None], bank.groups[0].entries[-1]["index"] + 1)

    # the new frame, its victim and the two below are read, and their successors are written
    moved = size * (1 + 1 + 1 / 4 + 1 + 1 / 4)
    measure("24/24/144, 16×16×1152", ours, Pieces(frames, steps), moved, moved / 2, calls=steps, peer=peer)
    benchmark.extra_info["ratio_to_one_reading"] = benchmark.extra_info["ratio_to_floor"] * moved / size


@pytest.mark.benchmark(group="bank: a clip at once, read once")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compress(measure, device, dtype):
    """Time planning and gathering; the floor is reading the clip once."""
    frames = video(600, 16, 1152, device, dtype)
    layout = layout_of(frames)
    maps = layout_maps(layout, frames)

    def ours(x: Tensor) -> Tensor:
        plan = bank_plan(x[None], layout, maps=maps)
        return bank_gather(x[None], plan, layout, maps=maps).slots

    streamed = ours_of(layout, maps)(frames)
    gathered = ours(frames)
    limit = float(4 * torch.finfo(dtype).eps * gathered.abs().max())
    torch.testing.assert_close(gathered, streamed.slots, rtol=0, atol=limit)
    size = frames.numel() * frames.element_size()
    name = f"24/24/144, 600 of 16×16×1152 {str(dtype).removeprefix('torch.')}"
    measure(name, ours, Rotation(frames), size, frames.numel() * 2, streamed=ours_of(layout, maps))


@pytest.mark.benchmark(group="bank: 64 streams in one call")
def test_many_streams(measure, device):
    frames = video(64 * 48, 8, 256, device).unflatten(0, (64, 48))
    layout = layout_of(frames, (8, 8, 32))
    maps, state = layout_maps(layout, frames), layout.new_state(64, device, torch.float32)
    bank_push_(state, layout, frames, maps=maps)
    alone = layout.new_state(1, device, torch.float32)
    bank_push_(alone, layout, frames[5:6].contiguous(), maps=maps)
    assert torch.equal(state.slots[5], alone.slots[0])
    moved = frames[:, 0].numel() * frames.element_size() * (1 + 1 + 1 / 4 + 1 + 1 / 4)

    def ours(x: Tensor) -> None:
        for t in range(48):
            bank_push_(state, layout, x[:, t : t + 1], maps=maps)

    def each(x: Tensor) -> None:
        for t in range(48):
            for s in range(64):
                bank_push_(BankState(*(y[s : s + 1] for y in state)), layout, x[s : s + 1, t : t + 1], maps=maps)

    measure("64 streams, 8×8×256", ours, Rotation(frames), moved, moved / 2, calls=48, one_call_a_stream=each)
