"""MA-LMM: each token position merges its own closest neighbours in time."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.recordings import Case, implementations
from vmemory.banks import TokenMergingBank
from vmemory.ops import adjacent_merge


def check(case: Case) -> None:
    if not case.holds("frames", "bank", "size"):
        case.skip()
    check_operator(case)
    check_memory(case)


def check_operator(case: Case) -> None:
    """One merge a frame, by the operator: the same pair at every step but where the recording tells of a tie."""
    frames, capacity = case.tensors["frames"], case.facts["capacity"]
    for impl in implementations():
        bank, size = frames[:, :capacity], torch.ones((frames.shape[0], capacity, frames.shape[2]))
        places = {}
        for t in range(capacity, frames.shape[1]):
            new = frames[:, t : t + 1]
            joined = torch.cat([bank, new], 1), torch.cat([size, torch.ones_like(size[:, :1])], 1)
            bank, size, place = adjacent_merge(*joined, "token", impl=impl)
            places[t] = place.tolist()
        if not case.facts["steps_with_a_tie"]:
            assert places == {step["newest_frame"]: step["left_of_merged_pair"] for step in case.facts["steps"]}
        assert_equal(case, bank, size)


def check_memory(case: Case) -> None:
    """One entry more, and one frame more: the newest stands beside what the original holds."""
    frames, capacity = case.tensors["frames"], case.facts["capacity"]
    B, T, N, C = frames.shape
    frames = torch.cat([frames, torch.ones(B, 1, N, C)], 1)[:, :, None]
    held = TokenMergingBank(C, (1, N), capacity + 1, streams=B)
    for t in range(T + 1):
        held.push(frames[:, t : t + 1])
    for tokens in (held.read(padded=True), held.compress(frames)):
        bank, size = by_position(tokens.tokens, tokens.cell, N), by_position(tokens.weight[..., None], tokens.cell, N)
        assert_equal(case, bank[:, :-1], size[:, :-1, :, 0])
        assert torch.equal(bank[:, -1], frames[:, -1, 0])
        first = by_position(tokens.frame[..., None], tokens.cell, N)[:, :-1, :, 0]
        spans = torch.tensor(case.facts["final_spans_first_last_frame"])
        assert torch.equal(first, spans[..., 0].transpose(1, 2))


def by_position(x: Tensor, cell: Tensor, cells: int) -> Tensor:
    """`[B, entries · N, ...]` in stream order as `[B, entries, N, ...]`."""
    order = cell.argsort(dim=1, stable=True)[..., None].expand_as(x)
    return x.gather(1, order).unflatten(1, (cells, -1)).transpose(1, 2)


def assert_equal(case: Case, bank: Tensor, size: Tensor) -> None:
    torch.testing.assert_close(bank, case.tensors["bank"], rtol=0, atol=1e-6)
    assert torch.equal(size, case.tensors["size"])
