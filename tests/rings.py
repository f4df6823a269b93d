"""Rings and slots, kernel and reference side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.reference import ring as reference
from vmemory.testing import assert_within_budget, random_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")
VARIANTS = ["flat", "mean", "mean, kept"]


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A memory without frames: slots full of NaN, so that a read of what was never written shows."""
    return torch.full(shape, NAN, dtype=dtype, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device)


def means_for(slots: Tensor, variant: str) -> Tensor | None:
    if variant != "mean, kept":
        return None
    wide = torch.float64 if slots.dtype == torch.float64 else torch.float32
    return torch.full((*slots.shape[:2], slots.shape[3]), NAN, dtype=wide, device=slots.device)


def copies(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.clone() for x in tensors]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def push_both(push, steps: int, shape: tuple[int, ...], frames: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Pushes until the ring has wrapped three times; kernel and reference hold the same after each."""
    slots, count = empty(*shape, dtype=dtype, device=device)
    expected = copies(slots, count)
    streams = torch.tensor([shape[0] - 1, -1, shape[0], 0], device=device)
    for step in range(steps):
        routed = shape[0] > 1 and step % 2 == 1
        rows = len(streams) if routed else shape[0]
        x = random_tensor(rows, frames, *shape[2:], dtype=dtype, seed=step, device=device)
        push(slots, count, x, streams if routed else None)
        reference.ring_push_(*expected, x, streams if routed else None)
        assert_same(slots, expected[0])
        assert_same(count, expected[1])


SHAPES = [
    ((2, 3, 5, 7), 1),
    ((1, 4, 63, 1000), 3),
    ((3, 4, 2, 9), 11),
    ((2, 1, 3, 4), 2),
    ((2, 0, 3, 4), 2),
    ((2, 3, 0, 4), 1),
    ((2, 3, 4, 5), 0),
    ((0, 3, 4, 5), 2),
]


def replace_both(replace, steps: int, shape: tuple[int, ...], variant: str, dtype: torch.dtype, device: str = "cpu"):
    """One frame after the other; wherever the reference's margin exceeds rounding the same slot is replaced."""
    slots, count = empty(*shape, dtype=dtype, device=device)
    level, means, places = variant.split(",")[0], means_for(slots, variant), []
    streams = torch.tensor([shape[0] - 1, -1, shape[0], 0], device=device)
    for step in range(steps):
        routed = shape[0] > 1 and step % 2 == 1
        rows = len(streams) if routed else shape[0]
        x = random_tensor(rows, *shape[2:], dtype=dtype, seed=step, device=device)
        state = copies(slots, count, means)
        route = streams if routed else None
        actual = replace(slots, count, x, route, level, means)
        expected = reference.slot_replace_(state[0], state[1], x, route, level, state[2])
        assert torch.equal(actual, expected)
        assert_same(slots, state[0])
        assert_same(count, state[1])
        if means is not None:
            assert_within_budget(means.nan_to_num(), state[2].nan_to_num(), reference_means(slots, count))
            means.copy_(state[2])
        places += actual.tolist()
    return places


def reference_means(slots: Tensor, count: Tensor) -> Tensor:
    written = torch.arange(slots.shape[1], device=slots.device) < count[:, None]
    return torch.where(written[..., None], slots.double().mean(2), 0)
