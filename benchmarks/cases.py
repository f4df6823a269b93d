"""The table of timed cases, used by the benchmarks and by the test of their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmemory.ops import adjacent_similarity, grid_pool, grid_pool_ragged
from vmemory.reference import adjacent_similarity as adjacent_reference
from vmemory.reference import grid_pool as pool_reference
from vmemory.reference import grid_pool_ragged as ragged_reference
from vmemory.testing import random_tensor

Make = Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One row: an operator on one shape, and the same computation in plain PyTorch."""

    name: str
    shape: Make
    """Input shape for a number of frames."""
    op: Callable[[Tensor], Any]
    plain: Callable[[Tensor], Any]
    """The same computation in plain PyTorch."""
    written: float
    """Bytes written per byte of input; the input is read once."""
    operations: float
    """Additions and multiplications per element of input."""
    dtype: torch.dtype = torch.float32
    frames: int = 256
    backward: bool = False
    """Time forward and backward together, for a gradient of ones."""

    def input(self, frames: int | None = None, device: str = "cpu") -> Tensor:
        x = random_tensor(*self.shape(self.frames if frames is None else frames), dtype=self.dtype, device=device)
        return x.requires_grad_(self.backward)

    def run(self, x: Tensor) -> Any:
        return self._call(self.op, x)

    def reference(self, x: Tensor) -> Any:
        return self._call(self.plain, x)

    def compiled(self) -> Callable[[Tensor], Any]:
        """Return `reference` compiled by torch.compile."""
        function = torch.compile(self.plain, dynamic=False)
        return lambda x: self._call(function, x)

    def _call(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        if not self.backward:
            return function(x)
        out = function(x)
        return out.detach(), torch.autograd.grad(out, x, torch.ones_like(out))[0]

    def bytes(self, x: Tensor) -> float:
        return x.numel() * x.element_size() * (1 + self.written)

    def flops(self, x: Tensor) -> float:
        return x.numel() * self.operations


def _grid(frames: int) -> tuple[int, ...]:
    return (frames, 16, 16, 1152)


def _stream(frames: int) -> tuple[int, ...]:
    return (1, frames, 256, 1152)


def _sizes(frames: int) -> list[int]:
    # one frame in eight at full size, as in a memory of three tiers
    return [16 if t % 8 == 0 else 8 if t % 4 == 0 else 4 for t in range(frames)]


def _pool(name: str, size: int, mode: str, written: float, operations: float, **options: Any) -> Case:
    stats = options.pop("stats", False)

    def run(x: Tensor) -> Any:
        return grid_pool(x, size, mode, stats=stats)

    def reference(x: Tensor) -> Any:
        pooled = pool_reference.grid_pool(x, (size, size), mode)
        return (pooled, *pool_reference.frame_stats(x)) if stats else pooled

    return Case(name, _grid, run, reference, written, operations, **options)


def _adjacent(name: str, level: str, operations: float, written: float = 0.0, **options: Any) -> Case:
    def run(x: Tensor) -> Tensor:
        return adjacent_similarity(x, level)

    def reference(x: Tensor) -> Tensor:
        return adjacent_reference.adjacent_similarity(x, level)

    return Case(name, _stream, run, reference, written, operations, **options)


GRID_POOL = [
    _pool("area 16→8", 8, "area", 1 / 4, 1.25),
    _pool("area 16→8 bf16", 8, "area", 1 / 4, 1.25, dtype=torch.bfloat16),
    _pool("area 16→8 + mean, norm", 8, "area", 1 / 4, 2.25, stats=True),
    _pool("area 16→4", 4, "area", 1 / 16, 1.06),
    _pool("area 16→7", 7, "area", 49 / 256, 1.7),
    _pool("bilinear 16→8", 8, "bilinear", 1 / 4, 2.0),
    _pool("pixel_shuffle_v2", 8, "pixel_shuffle_v2", 1.0, 0.0),
    # the backward pass reads the gradient of the output and writes that of the input
    _pool("area 16→8, forward + backward", 8, "area", 1 / 4 + 1 / 4 + 1, 2.25, backward=True),
    _pool("one frame, area 16→8 + mean, norm", 8, "area", 1 / 4, 2.25, stats=True, frames=1),
    Case(
        "ragged 16, 8 and 4",
        _grid,
        lambda x: grid_pool_ragged(x, _sizes(len(x))).tokens,
        lambda x: ragged_reference.grid_pool_ragged(x, [(s, s) for s in _sizes(len(x))]),
        1 / 8 + 1 / 8 / 4 + 3 / 4 / 16,
        1.2,
    ),
]

ADJACENT_SIMILARITY = [
    _adjacent("frame", "frame", 1.02),
    _adjacent("frame bf16", "frame", 1.02, dtype=torch.bfloat16),
    _adjacent("token", "token", 4.0),
    _adjacent("token bf16", "token", 4.0, dtype=torch.bfloat16),
    # the backward pass reads the input once more and writes its gradient
    _adjacent("token, forward + backward", "token", 9.0, 2.0, backward=True, frames=128),
]
