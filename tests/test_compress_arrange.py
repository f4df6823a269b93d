"""Token grids by frame number, against a memory with room for all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vmemory import banks
from vmemory.compress import ReducedTokens, TokenArrangement
from vmemory.compress import tokens_arrange as arrange
from vmemory.testing import random_tensor


def clip(T: int = 5, H: int = 3, W: int = 4, D: int = 6, S: int | None = None, **kind) -> Tensor:
    x = random_tensor(S or 1, T, H, W, D, **kind)
    return x if S else x[0]


def test_tokens_arrange_has_the_originals_intervals_and_ends() -> None:
    assert arrange(20) == arrange(20, [8, 4, 1], [1, 2, 4])
    assert arrange(0) == []
    assert arrange(5, []) == []


@pytest.mark.parametrize("S", [None, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_arranged_tokens_are_pooled_frames(S: int | None, start: int) -> None:
    T, H, W = 13, 8, 12
    tokens, time = clip(T, H, W, S=S), torch.arange(T, dtype=torch.float64)
    module = TokenArrangement((8, 4, 2))
    reduced = module(tokens, time, start=start)
    n = module.count(T, (H, W), start)
    ratios = [
        next((r for step, r in zip((8, 4, 2), (1, 2, 4), strict=True) if t % step == 0), 0)
        for t in range(start, start + T)
    ]
    assert arrange(T, (8, 4, 2)) == [r for r in [1, 0, 4, 0, 2, 0, 4, 0, 1, 0, 4, 0, 2] if r]
    for s in range(S or 1):
        one = ReducedTokens(*(field[s] for field in reduced[:-1])) if S else reduced
        clip_s = tokens[s] if S else tokens
        assert one.tokens.shape == (n, 6)
        place = 0
        for t, ratio in enumerate(ratios):
            if not ratio:
                assert not bool((one.frame == t).any())
                continue
            h, w = H // ratio, W // ratio
            rows = slice(place, place + h * w)
            pooled = torch.nn.functional.adaptive_avg_pool2d(clip_s[t].permute(2, 0, 1), (h, w)).flatten(1).T
            torch.testing.assert_close(one.tokens[rows], pooled)
            assert bool((one.frame[rows] == t).all())
            assert bool((one.time[rows] == t).all())
            assert bool((one.level[rows] == [1, 2, 4].index(ratio)).all())
            assert bool((one.weight[rows] == ratio**2).all())
            # the owned cell lies in the middle of the window
            y, x = one.cell[rows] // W, one.cell[rows] % W
            assert torch.equal(y // ratio * w + x // ratio, torch.arange(h * w))
            place += h * w
        assert place == n
        assert bool((one.source.diff() > 0).all())
        assert torch.equal(one.source, one.frame * H * W + one.cell)


def test_arrangement_gives_what_a_roomy_memory_holds() -> None:
    tokens = clip(17, 8, 8)
    bank = banks.HierarchicalBank(
        6,
        (8, 8),
        capacity=(20, 20, 20),
        grid_size=((8, 8), (4, 4), (2, 2)),
        rule="videochat-online",
        intervals=(8, 4, 1),
    )
    bank.push(tokens)
    held, reduced = bank.read(), TokenArrangement()(tokens)
    for name in ("frame", "cell", "level", "weight", "source"):
        assert torch.equal(getattr(held, name), getattr(reduced, name)), name
    torch.testing.assert_close(held.tokens, reduced.tokens)


def test_arrangement_is_differentiable_and_compiles() -> None:
    tokens = clip(5, 4, 4, 3, S=2, dtype=torch.float64).requires_grad_()
    module = TokenArrangement()
    assert torch.autograd.gradcheck(lambda x: module(x).tokens, (tokens,))
    compiled = torch.compile(lambda x: module(x).tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens.detach()), module(tokens.detach()).tokens)


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (TypeError, lambda: arrange(2.0), "num_frames: expected an int"),
        (ValueError, lambda: arrange(-1), "num_frames: expected at least 0"),
        (ValueError, lambda: arrange(3, [0]), "intervals: expected at least 1"),
        (ValueError, lambda: arrange(3, [4, 1], [1]), r"ratios: expected one per interval \(2\)"),
        (ValueError, lambda: TokenArrangement([1], [0]), "ratios: expected at least 1"),
        (ValueError, lambda: TokenArrangement()(clip(4, 3, 4)), "ratios: expected at most 3"),
        (ValueError, lambda: TokenArrangement()(clip(1), start=-1), "start: expected at least 0"),
        (TypeError, lambda: TokenArrangement()([1.0]), "tokens: expected a tensor"),
    ],
)
def test_bad_arrangements_are_named(error: type, call, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
