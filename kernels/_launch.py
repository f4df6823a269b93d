"""What launchers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def from_host(values: Sequence[int], like: Tensor) -> Tensor:
    """`values` as int64 on `like`'s device. Nobody waits for them; within the capture of a CUDA graph torch refuses."""
    held = torch.tensor(list(values), dtype=torch.int64)
    if like.is_cuda and not torch.cuda.is_current_stream_capturing():
        return held.pin_memory().to(like.device, non_blocking=True)
    return held.to(like.device)


def device_of(tensor: Tensor):
    """Context in which `tensor`'s device is the current one, where Triton launches; does nothing for CPU tensors."""
    from torch.cuda import device_of as guard

    return guard(tensor)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def channel_block(channels: int, most: int) -> int:
    """A power of two for blocks of channels: of the three largest the one with the fewest masked lanes."""
    most = min(most, max(16, power_of_two(channels)))
    choices = [block for block in (most, most // 2, most // 4) if block >= 16]
    return min(choices, key=lambda block: (-(-channels // block) * block, -block))
