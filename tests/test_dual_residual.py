"""A dual memory as it stands in a model: a share of what it makes of a frame, and channels that ride behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vmemory import banks
from vmemory.testing import random_tensor

GRID, DIM, RIDING, N = (2, 3), 8, 5, 6


def memory_of(capacities: tuple[int, int] | None = (2, 3), alpha: float = 0.0, **arguments: Any) -> banks.DualMemory:
    torch.manual_seed(0)
    given = {"dim": DIM, "grid": GRID, "heads": 2, "residual": True} | arguments
    memory = banks.DualMemory(capacity=capacities, **given)
    if memory.alpha is not None:
        torch.nn.init.constant_(memory.alpha, alpha)
    return memory


def video(T: int, channels: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(T, *GRID, channels, dtype=dtype, seed=seed)


# the share


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"empty": "zeros", "rule": "bridged"}, {"salience": 0.0, "heads": 4}],
)
@pytest.mark.parametrize("riding", [0, RIDING])
def test_untrained_every_frame_passes_to_the_bit(dtype: torch.dtype, options: dict, riding: int) -> None:
    memory = memory_of(dim=DIM + riding, key_dim=DIM, dtype=dtype, **options)
    frames = video(9, DIM + riding, dtype=dtype)
    assert torch.equal(memory.transform(frames).tokens, frames.flatten(0, 2))
    assert torch.equal(torch.cat([memory.push(part) for part in frames.split(2)]), frames)
    held = memory.read()
    assert set(held.level.tolist()) == {0, 1}
    assert torch.equal(held.tokens, frames.flatten(0, 2)[held.source])


def test_a_first_step_reaches_the_share_and_the_next_ones_everything() -> None:
    memory = memory_of(empty="frame")
    clip, wanted = video(9), video(9, seed=1).flatten(0, 2)
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    losses = []
    for step in range(12):
        loss = (memory.transform(clip).tokens - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        reached = {name for name, weight in memory.named_parameters() if bool((weight.grad != 0).any())}
        assert reached == ({"alpha"} if step == 0 else {name for name, _ in memory.named_parameters()})
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_share_of_one_is_algorithm_1() -> None:
    residual, plain = memory_of(alpha=1.0), memory_of(residual=False)
    plain.load_state_dict({name: x for name, x in residual.state_dict().items() if name != "alpha"})
    assert plain.alpha is None
    frames = video(12)
    torch.testing.assert_close(residual.push(frames), plain.push(frames))
    assert torch.equal(residual.entry, plain.entry)


@pytest.mark.parametrize("slots", ["tokens", "means"])
@pytest.mark.parametrize("chunk", [1, 3, 11])
def test_slots_hold_what_the_training_path_gives(slots: str, chunk: int) -> None:
    memory = memory_of(alpha=0.7, dim=DIM + RIDING, key_dim=DIM, slots=slots)
    frames = video(11, DIM + RIDING)
    made = memory.transform(frames).tokens.detach().unflatten(0, (11, N))
    fused = torch.cat([memory.push(part) for part in frames.split(chunk)]).flatten(1, 2)
    held = memory.read()
    for level, whole in ((0, frames.flatten(1, 2)), (1, made)):
        rows = held.frame[held.level == level].unique_consecutive()
        slots_of = held.tokens[held.level == level].unflatten(0, (len(rows), -1))
        want = whole[rows] if slots == "tokens" else whole[rows].mean(1, keepdim=True)
        torch.testing.assert_close(slots_of, want, rtol=1e-6, atol=1e-6)
        if slots == "tokens" and level == 0:
            assert torch.equal(slots_of, want)
    torch.testing.assert_close(fused, made, rtol=1e-6, atol=1e-6)
    assert chunk < 11 or torch.equal(fused, made)


# channels that ride behind


@pytest.mark.parametrize("options", [{}, {"slots": "means", "empty": "zeros"}, {"rule": "bridged", "salience": 0.5}])
@pytest.mark.parametrize("masked", [False, True])
def test_what_rides_behind_changes_nothing_in_front_and_stays_with_its_frame(options: dict, masked: bool) -> None:
    wide = memory_of(alpha=0.5, dim=DIM + RIDING, key_dim=DIM, streams=2, **options)
    bare = memory_of(alpha=0.5, streams=2, **options)
    assert wide.state_dict().keys() == bare.state_dict().keys()
    frames = torch.stack([video(12, DIM + RIDING), video(12, DIM + RIDING, seed=1)])
    exists = torch.stack([random_tensor(12, *GRID, seed=s) > -0.5 for s in (2, 3)]) if masked else None
    for start in range(0, 12, 3):
        part, there = frames[:, start : start + 3], None if exists is None else exists[:, start : start + 3]
        streams = torch.tensor([1, -1] if start == 6 else [1, 0])
        out = wide.push(part, mask=there, streams=streams)
        front = bare.push(part[..., :DIM].contiguous(), mask=there, streams=streams)
        torch.testing.assert_close(out[..., :DIM], front)
        behind = part[..., DIM:] if there is None else torch.where(there[..., None], part[..., DIM:], 0)
        assert torch.equal(out[..., DIM:], torch.where((streams >= 0)[:, None, None, None, None], behind, 0))
    for stream in range(2):
        held, plain = wide.read(stream), bare.read(stream)
        assert torch.equal(held.source, plain.source)
        torch.testing.assert_close(held.tokens[:, :DIM], plain.tokens)
        # stream 0 has missed the third push, and came second in the others
        came = frames[1 - stream] if stream else torch.cat([frames[1, :6], frames[1, 9:]])
        behind = came[..., DIM:].flatten(1, 2)
        if wide.slots == "tokens":
            assert torch.equal(held.tokens[:, DIM:], behind.flatten(0, 1)[held.source])
        elif not masked:
            torch.testing.assert_close(held.tokens[:, DIM:], behind.mean(1)[held.frame])
        for query in (torch.ones(1, DIM), torch.ones(1, DIM + RIDING)):
            assert torch.equal(
                wide.search(query, 2, stream=stream).frame, bare.search(query[:, :DIM], 2, stream=stream).frame
            )
    assert wide.read(padded=True).tokens.shape[-1] == DIM + RIDING
    with pytest.raises(ValueError, match=r"query: expected \[Q, 8\], got shape \[1, 9\]"):
        wide.search(torch.ones(1, 9), 1)


def test_a_training_clip_may_have_more_channels_than_are_held() -> None:
    memory, clip = memory_of(alpha=0.5), video(7, DIM + RIDING).requires_grad_()
    made = memory.transform(clip, mask=random_tensor(7, *GRID) > 0)
    front = memory.transform(clip[..., :DIM], mask=random_tensor(7, *GRID) > 0)
    torch.testing.assert_close(made.tokens[:, :DIM], front.tokens)
    assert torch.equal(made.tokens[:, DIM:], clip.flatten(0, 2)[made.source, DIM:])
    made.tokens[:, DIM:].sum().backward()
    assert torch.equal(clip.grad[..., DIM:].flatten(0, 2).any(1).nonzero().flatten(), made.source)
    with pytest.raises(ValueError, match=r"frames: expected \[S, T, 2, 3, 8\], got shape \[1, 7, 2, 3, 6\]"):
        memory.transform(clip[..., :6])
    with pytest.raises(ValueError, match=r"frames: expected \[S, T, 2, 3, 8\], got shape \[1, 7, 2, 3, 13\]"):
        memory.push(clip)


def test_a_frame_that_is_broken_behind_enters_neither_memory() -> None:
    memory = memory_of(alpha=0.5, dim=DIM + RIDING, key_dim=DIM)
    frames = video(6, DIM + RIDING)
    frames[4, 1, 1, DIM + 2] = torch.inf
    out = memory.push(frames)
    assert torch.equal(out[..., DIM:], frames[..., DIM:])
    assert bool(out[..., :DIM].isfinite().all())
    assert memory.counts().items() >= {"seen": 6, "entered": 5, "written": 5, "held": 5}.items()
    assert bool(memory.read().tokens.isfinite().all())


def test_bytes_of_what_rides_behind_are_counted() -> None:
    wide, bare = memory_of(dim=DIM + RIDING, key_dim=DIM), memory_of()
    assert wide.nbytes - bare.nbytes == 5 * N * RIDING * 4
    budget = memory_of(None, dim=40, key_dim=DIM, budget="64KiB")
    assert budget.nbytes <= 64 * 1024
    assert budget.capacity < memory_of(None, budget="64KiB").capacity


# dtypes


def test_narrower_frames_are_widened_and_autocast_does_not_reach_in() -> None:
    memory, other = memory_of(alpha=0.5), memory_of(alpha=0.5)
    narrow = video(8, dtype=torch.bfloat16)
    wanted = other.push(narrow.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory.push(narrow), wanted)
        made = memory.transform(narrow).tokens
        made.sum().backward()
    assert made.dtype == torch.float32
    assert torch.equal(made, wanted.flatten(0, 2))
    assert memory.alpha.grad.abs() > 0
    with pytest.raises(ValueError, match=r"frames: expected the memory's dtype torch\.float32, got torch\.float64"):
        memory.push(narrow.double())
    with pytest.raises(ValueError, match=r"frames: expected the memory's dtype torch\.float32, got torch\.int64"):
        memory.transform(narrow.long())


# the same memory for other frames


def test_a_memory_like_another_has_its_weights_and_options() -> None:
    memory = memory_of(alpha=0.5, rule="bridged", salience=0.25, adapter=banks.FeatureAdapter(3, DIM))
    memory.push(video(4, 3))
    other = memory.like((4, 5), dim=DIM + RIDING, streams=2)
    assert other.to_dict() == memory.to_dict() | {"grid": [4, 5], "dim": DIM + RIDING, "streams": 2}
    assert other.counts().items() >= {"seen": 0, "entered": 0, "written": 0, "held": 0}.items()
    for (name, mine), theirs in zip(memory.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr(), name
    sizes = memory.like(GRID, capacity=(1, 6), rule="most-similar", dtype=torch.float64)
    assert (sizes.capacities, sizes.rule, sizes.alpha.dtype) == ((1, 6), "most-similar", torch.float64)
    assert memory.bfloat16().like(GRID).working_tokens.dtype == torch.bfloat16
    for changes, words in (
        ({"heads": 4}, "heads: expected 2, as trained, got 4"),
        ({"residual": False}, "residual: expected True, as trained, got False"),
        ({"key_dim": 4}, "key_dim: expected 8, as trained, got 4"),
        ({"budget": "64KiB", "capacity": (2, 3)}, "budget: expected either capacity or a budget, got both"),
    ):
        with pytest.raises(ValueError, match=words):
            memory.like(GRID, **changes)


def test_a_budget_means_the_same_bytes_for_every_grid() -> None:
    small = memory_of(None, grid=(1, 1), budget="8KiB", alpha=0.5)
    fitting = small.like(GRID)
    assert fitting.nbytes <= 8 * 1024
    assert fitting.capacity < small.capacity
    assert small.like(GRID, capacity=(2, 3)).capacities == (2, 3)
    assert fitting.like((1, 1)).capacities == small.capacities
    frames = video(40)
    assert torch.equal(small.transform(frames).tokens, fitting.push(frames).flatten(0, 2))
    assert memory_of().like(GRID, budget="8KiB").capacities == fitting.capacities
