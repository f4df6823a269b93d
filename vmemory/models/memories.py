"""Types that are accepted as a memory."""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from vmemory.banks import Memory, MemoryTokens


class Compressor(Protocol):
    """An object that compresses a whole video at once; every memory is one."""

    def compress(self, clip: Tensor, time: Tensor | None = None, *, mask: Tensor | None = None) -> MemoryTokens:
        """Return the tokens kept of frames `clip [T, H, W, D]` with seconds `time [T]`; `mask` as in `Bank.push`."""
        ...


class MemoryFactory(Protocol):
    """A function that makes a memory for the tokens of a model."""

    def __call__(
        self, *, dim: int, grid: tuple[int, int], key_dim: int | None, device: torch.device, dtype: torch.dtype
    ) -> Memory:
        """Return a memory for frames of `grid` (H, W) tokens with `dim` channels, the first `key_dim` of them keys."""
        ...


# a memory, anything with `compress`, a module that a model family knows, or a factory; or a policy's name
GivenMemory = Memory | Compressor | MemoryFactory | nn.Module
MemoryLike = str | GivenMemory


def is_factory(memory: object) -> TypeGuard[MemoryFactory]:
    """Return whether this is a function that makes a memory; a module is callable but no factory."""
    return callable(memory) and not isinstance(memory, nn.Module) and not hasattr(memory, "compress")
