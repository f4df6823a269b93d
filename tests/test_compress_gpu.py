"""Reducers and slot memories on a device: nothing waits for it, graphs replay, decisions are the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from vmemory import banks
from vmemory.compress import AdaptiveFrameResampler, FrameResampler, FrameSelector, PixelDifference, TokenDifference
from vmemory.ops import grid_pool_ragged, select_tokens
from vmemory.testing import random_tensor

pytestmark = pytest.mark.gpu
SMALL: dict[str, Any] = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same(a: Any, b: Any) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None and y is None) or torch.equal(x.cpu().nan_to_num(7.0), y.cpu().nan_to_num(7.0)), name


def replay(step: Callable[[], Any], fill: Callable[[], None]) -> Any:
    """Capture `step` on whatever its inputs hold, then run it on what `fill` puts there."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    fill()
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("make", [
    lambda: TokenDifference(budget=300),
    lambda: TokenDifference(budget=0.25),
    lambda: TokenDifference(threshold=0.8),
    lambda: TokenDifference("pixel", budget=300),
    lambda: PixelDifference(),
])  # fmt: skip
def test_token_reducers_replay_from_a_graph(make: Callable[[], TokenDifference]) -> None:
    reducer = make()
    tokens = random_tensor(2, 9, 8, 8, 64, dtype=torch.bfloat16)
    pixels = random_tensor(2, 9, 3, 32, 32) if reducer.by == "pixel" else None
    if pixels is not None:
        pixels[:, 4, :, :16] = pixels[:, 3, :, :16]
    else:
        tokens[:, 4, :5] = tokens[:, 3, :5]
    want = reducer(tokens, pixels=pixels)
    device = torch.full_like(tokens, torch.nan, device="cuda")
    shown = None if pixels is None else torch.full_like(pixels, torch.nan, device="cuda")

    def fill() -> None:
        device.copy_(tokens)
        if shown is not None and pixels is not None:
            shown.copy_(pixels)

    got = replay(lambda: reducer(device, pixels=shown), fill)
    if pixels is not None or reducer.budget is None:
        same(got, want)
    assert torch.equal(got.count.cpu(), want.count)
    with no_waiting():
        reducer(device, pixels=shown)
        reducer.mask(device, pixels=shown)
        if reducer.budget is not None:
            reducer(device[0], pixels=None if shown is None else shown[0])


@pytest.mark.parametrize("make", [
    lambda: FrameSelector(hidden_dim=16, output_frames=4),
    lambda: FrameResampler(12, 4, **SMALL),
    lambda: FrameResampler(12, 4, **SMALL, hard=True),
    lambda: AdaptiveFrameResampler(12, 2, 5, **SMALL),
])  # fmt: skip
def test_frame_compressors_never_wait(make: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().eval().cuda()
    frames = random_tensor(2, 9, 3, 32, 32, device="cuda")
    exists = torch.arange(9, device="cuda") < torch.tensor([[9], [6]], device="cuda")
    want = module(frames, exists)
    want.frames.sum().backward()
    with no_waiting():
        got = module(frames, exists)
        got.frames.sum().backward()
    same(got, want)
    assert bool(got.mask[1].any())


@pytest.mark.parametrize("policy", ["episodic", "reservoir"])
def test_slot_memories_replay_from_a_graph(policy: str) -> None:
    bank = banks.build_memory(policy, dim=16, grid=(4, 4), capacity=6, streams=2, device="cuda")
    host = banks.build_memory(policy, dim=16, grid=(4, 4), capacity=6, streams=2)
    video = random_tensor(2, 19, 4, 4, 16)
    buffer = video[:, :1].cuda()
    empty = bank.snapshot()
    bank.push(buffer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bank.push(buffer)
    bank.restore(empty)
    for t in range(19):
        buffer.copy_(video[:, t : t + 1])
        graph.replay()
        host.push(video[:, t : t + 1])
    with no_waiting():
        bank.push(buffer)
    host.push(video[:, 18:])
    got, want = bank.read(padded=True), host.read(padded=True)
    assert torch.equal(got.source.cpu(), want.source)
    assert torch.equal(got.tokens.cpu(), want.tokens)


@pytest.mark.parametrize("make", [
    lambda: banks.HierarchicalBank(16, (4, 4), (3, 2), ((4, 4), (3, 3)), device="cuda"),
    lambda: banks.build_memory("episodic", dim=16, grid=(4, 4), capacity=3, device="cuda"),
    lambda: banks.DualMemory(16, (4, 4), (2, 3), device="cuda"),
])  # fmt: skip
def test_times_of_the_host_and_questions_never_wait(make: Callable[[], Any]) -> None:
    bank, frames, query = make(), random_tensor(2, 4, 4, 16, device="cuda"), random_tensor(3, 16, device="cuda")
    bank.push(frames, [0.0, 1.0])
    bank.search(query, 2)
    with no_waiting():
        bank.push(frames, [2.0, 3.0])
        bank.push(frames[:1], 4.0)
        bank.push(frames[1:], torch.tensor([5.0], dtype=torch.float64))
        found = bank.search(query, 2, threshold=-1.0)
        bank.read(padded=True)
    assert {0.0, 1.0, 2.0, 3.0, 4.0, 5.0} >= set(found.time.flatten().tolist())
    assert sorted(bank.entries().time.unique().tolist())[-2:] == [4.0, 5.0]


def test_sizes_and_budgets_of_the_host_are_not_waited_for() -> None:
    grids, scores = random_tensor(4, 6, 6, 8, device="cuda"), random_tensor(2, 50, device="cuda")
    segments = torch.arange(50, device="cuda") % 2

    def run() -> list[Tensor]:
        return [grid_pool_ragged(grids, [6, 3, 3, 2]).tokens, *select_tokens(scores, [3, 5], segments, impl="triton")]

    want = run()
    with no_waiting():
        got = run()
    assert all(map(torch.equal, got, want))


def test_tensor_type_is_kept_on_the_device() -> None:
    tokens: Tensor = random_tensor(3, 4, 4, 8, dtype=torch.float16, device="cuda")
    reduced = TokenDifference(budget=20)(tokens)
    assert reduced.tokens.dtype == torch.float16
    assert all(field is None or field.is_cuda for field in reduced)
