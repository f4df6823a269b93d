"""Merging at each token position on its own, beside plain loops over the positions."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vmemory.banks import MemoryTokens, MergingBank, TokenMergingBank
from vmemory.testing import random_tensor

D, GRID, CAPACITY, T = 6, (2, 3), 4, 15
CELLS = GRID[0] * GRID[1]


def drift(S: int = 2, seed: int = 0) -> Tensor:
    """Frames whose tokens each drift on their own."""
    return random_tensor(S, T, *GRID, D, seed=seed).cumsum(1)


def seconds(S: int = 2) -> Tensor:
    return (torch.arange(T, dtype=torch.float64) / 2).expand(S, T) + torch.arange(S)[:, None]


def by_hand(tokens: Tensor, time: Tensor, capacity: int = CAPACITY) -> list[tuple[Tensor, int, int, float]]:
    """One position's entries after `tokens [T, D]`: mean, first and last frame, mean time; one pair a frame."""
    held: list[tuple[Tensor, list[int]]] = []
    for t, token in enumerate(tokens):
        if len(held) == capacity:
            cosine = [float(torch.cosine_similarity(a[0], b[0], dim=0)) for a, b in pairwise(held)]
            i = cosine.index(max(cosine))
            (a, frames), (b, more) = held[i : i + 2]
            share = len(frames) / (len(frames) + len(more))
            held[i : i + 2] = [(share * a + (1 - share) * b, frames + more)]
        held.append((token, [t]))
    return [(mean, frames[0], frames[-1], float(time[frames].mean())) for mean, frames in held]


def assert_holds(got: MemoryTokens, frames: Tensor, time: Tensor) -> None:
    """One stream's tokens are those of the loops, in stream order."""
    wanted = []
    for cell, (h, w) in enumerate((h, w) for h in range(GRID[0]) for w in range(GRID[1])):
        for mean, first, last, when in by_hand(frames[:, h, w], time):
            wanted.append((first * CELLS + cell, cell, first, last, when, mean))
    wanted.sort(key=lambda entry: entry[0])
    source, cell, first, last, when, mean = zip(*wanted, strict=True)
    assert got.source.tolist() == list(source)
    assert got.cell.tolist() == list(cell)
    assert got.frame.tolist() == list(first)
    assert got.weight.tolist() == [b - a + 1 for a, b in zip(first, last, strict=True)]
    torch.testing.assert_close(got.time, torch.tensor(when, dtype=torch.float64))
    assert torch.equal(got.start, time[torch.tensor(first)])
    assert torch.equal(got.stop, time[torch.tensor(last)])
    torch.testing.assert_close(got.tokens, torch.stack(mean))


@pytest.mark.parametrize("piece", [1, 4, T])
def test_holds_what_loops_over_the_positions_hold(piece: int) -> None:
    frames, time = drift(), seconds()
    bank = TokenMergingBank(D, GRID, CAPACITY, streams=2)
    before = bank.nbytes
    for at in range(0, T, piece):
        bank.push(frames[:, at : at + piece], time[:, at : at + piece])
    assert bank.nbytes == before
    padded, compressed = bank.read(padded=True), bank.compress(frames, time)
    for s in range(2):
        assert_holds(bank.read(s), frames[s], time[s])
        assert_holds(bank.compress(frames[s], time[s]), frames[s], time[s])
        for whole in (padded, compressed):
            assert whole.count.tolist() == [CELLS * CAPACITY] * 2
            assert torch.equal(whole.source[s], bank.read(s).source)
    # positions differ in what they merged, which a memory of whole frames never does
    assert len({tuple(padded.frame[0][padded.cell[0] == cell].tolist()) for cell in range(CELLS)}) > 1


def test_one_token_a_frame_is_the_bank_of_whole_frames() -> None:
    frames, time = drift()[:, :, :1, :1], seconds()
    mine, whole = TokenMergingBank(D, (1, 1), CAPACITY, streams=2), MergingBank(D, (1, 1), CAPACITY, streams=2)
    for bank in (mine, whole):
        bank.push(frames, time)
    for a, b in zip(mine.read(padded=True), whole.read(padded=True), strict=True):
        assert torch.equal(a, b)


def test_streams_cells_and_the_past() -> None:
    frames, time = drift(), seconds()
    bank = TokenMergingBank(D, GRID, 2 * T, streams=2)
    # rows go where they are told, and a skipped row goes nowhere
    bank.push(frames, time, streams=torch.tensor([1, -1]))
    assert bank.read(padded=True).count.tolist() == [0, T * CELLS]
    assert torch.equal(bank.read(1).tokens, frames[0].flatten(0, 2))
    with pytest.raises(ValueError, match="streams: expected less than 2, got 2"):
        bank.push(frames, time, streams=torch.tensor([0, 2]))
    kept = bank.snapshot()
    assert torch.equal(bank.fork(3.0).read(1).tokens, frames[0, :7].flatten(0, 2))
    assert bank.erase(1.0, 2.0, 1) == 3 * CELLS
    gone = (time[0] >= 1) & (time[0] <= 2)
    assert torch.equal(bank.read(1).tokens, frames[0, ~gone].flatten(0, 2))
    bank.restore(kept)
    assert bank.read(1).tokens.shape[0] == T * CELLS
    bank.reset([1])
    assert bank.read(padded=True).count.tolist() == [0, 0]
    # cells that do not exist are neither read nor held
    mask = torch.rand(T, *GRID, generator=torch.Generator().manual_seed(0)) < 0.7
    poisoned = frames[0].masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(bank.compress(poisoned, mask=mask).tokens, frames[0][mask])


def test_gradients_reach_every_frame() -> None:
    frames = drift(1)[0].requires_grad_()
    tokens = TokenMergingBank(D, GRID, CAPACITY).compress(frames)
    (tokens.tokens * tokens.weight[:, None]).sum().backward()
    torch.testing.assert_close(frames.grad, torch.ones_like(frames))


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (ValueError, {}, "capacity: expected exactly one of capacity and budget"),
        (ValueError, {"capacity": 3, "grid": (0, 2)}, r"grid: expected \(H, W\)"),
        (ValueError, {"capacity": 3, "streams": 0}, "streams: expected at least 1"),
        (ValueError, {"budget": 10}, "budget"),
    ],
)
def test_bad_settings_are_named(error: type, arguments: dict, words: str) -> None:
    with pytest.raises(error, match=words):
        TokenMergingBank(**{"dim": D, "grid": GRID} | arguments)


def test_bad_input_is_named() -> None:
    bank = TokenMergingBank(D, GRID, 3)
    with pytest.raises(TypeError, match="frames: expected a tensor"):
        bank.push([1.0])
    with pytest.raises(
        ValueError, match=r"frames: expected \[S, T, 2, 3, 6\] or \[T, 2, 3, 6\], got shape \[15, 3, 2, 6\]"
    ):
        bank.push(drift(1)[0].transpose(1, 2))
    with pytest.raises(ValueError, match=r"mask: expected bool \[15, 2, 3\], got"):
        bank.push(drift(1)[0], mask=torch.ones(T, 3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="time: expected shape"):
        bank.push(drift(1)[0], [1.0])
    with pytest.raises(ValueError, match="stream: expected"):
        bank.erase(0, 1, 1)
    assert bank.read().tokens.shape == (0, D)


def test_a_model_takes_it() -> None:
    pytest.importorskip("transformers")
    import vmemory
    from tests.tiny_vlms import tiny

    model, inputs = tiny("llava_onevision", T=8)
    plain = model(**inputs).logits
    with vmemory.attach(model, partial(TokenMergingBank, capacity=3)) as handle:
        model(**inputs)
        assert handle.last_prompt[0].tokens_after < handle.last_prompt[0].tokens_before / 2
    with vmemory.attach(model, partial(TokenMergingBank, capacity=8)):
        assert torch.equal(model(**inputs).logits, plain)
