"""Shared helpers of the launchers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor


class Kernel(triton.JITFunction):
    """Kernel whose products are rounded before they are added, as it is written.

    The compiler would otherwise add a product to a sum without rounding it. Where the threads of a program add their
    products to one sum, each thread would add its own product unrounded and the others rounded, and the threads would
    hold different sums. The default also differs between releases of Triton.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"enable_fp_fusion": False}

    def run(self, *args: Any, **options: Any) -> Any:
        return super().run(*args, **self.OPTIONS, **options)


def jit(function: Callable | None = None, **options: Any) -> Any:
    """Compile a kernel, or a function that kernels call, as `triton.jit` does."""
    if function is None:
        return partial(jit, **options)
    return Kernel(function, **options)


def from_host(values: Sequence[int], like: Tensor) -> Tensor:
    """Copy `values` to `like`'s device as int64 without waiting; torch refuses this while it captures a CUDA graph."""
    held = torch.tensor(list(values), dtype=torch.int64)
    if like.is_cuda and not torch.cuda.is_current_stream_capturing():
        return held.pin_memory().to(like.device, non_blocking=True)
    return held.to(like.device)


def device_of(tensor: Tensor):
    """Make `tensor`'s device current for a Triton launch, within a context; do nothing for CPU tensors."""
    from torch.cuda import device_of as guard

    return guard(tensor)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def channel_block(channels: int, most: int) -> int:
    """Return a block size for channels: the one of the three largest powers of two with the fewest masked lanes."""
    most = min(most, max(16, power_of_two(channels)))
    choices = [block for block in (most, most // 2, most // 4) if block >= 16]
    return min(choices, key=lambda block: (-(-channels // block) * block, -block))
