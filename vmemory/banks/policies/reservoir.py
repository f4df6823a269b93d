"""The newest frame and a random sample of all before it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import register_policy
from vmemory.ops._checks import check_int
from vmemory.reference.bank_layout import SEEN, SKIPPED, BankState

_MASK = 0xFFFFFFFF
# times a 32-bit number it still fits int64
_MOST = 2**31 - 1
_Word = TypeVar("_Word", int, Tensor)


def hash32(x: _Word) -> _Word:
    """Compute a hash of a 32-bit integer; both factors are below 2³¹, so that int64 never overflows."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK
    x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK
    return x ^ (x >> 15)


@register_policy
class ReservoirBank(SingleTierBank):
    """A memory of the newest frame and a uniform random sample of all frames before it.

    With M slots, each of the frames before the newest is held with the same probability, (M − 1) / (frames before);
    from 2³¹ frames on, two years of 30 a second, later ones enter as if there had been no more.
    The draw depends on `seed` and the number of frames taken in before alone: runs repeat, however the frames are split
    into pushes, and all streams of a bank draw alike.

    Args:
        dim, grid, capacity, grid_size, budget, streams, device, dtype, key_dim, adapter: As in `SingleTierBank`.
        seed: 0 to 2³² − 1.

    Raises:
        TypeError, ValueError: An argument does not fit.

    Source: reservoir sampling, Vitter (ACM TOMS 1985), Algorithm R, with the newest frame held back from the draw.
    """

    policy = "reservoir"
    # its list is that of the first-in-first-out memory; what leaves is not
    rule = "recent"

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        check_int("seed", seed, low=0, high=_MASK)
        super().__init__(*args, **kwargs)
        self.seed = seed
        self._config["seed"] = seed

    def choose(self, state: BankState, frames: Tensor, mask: Tensor | None) -> Tensor:
        M, taken = state.entry.shape[1], state.counter[:, SEEN] - state.counter[:, SKIPPED]
        # the frame held back so far is the taken-th, and stays with probability (M - 1) / taken
        drawn = (hash32(hash32(self.seed) ^ (taken & _MASK)) * taken.clamp_max(_MOST)) >> 32
        # the list of a full tier ends with it
        newest = state.order[:, -1]
        # its own slot cannot be drawn
        return torch.where(drawn < M - 1, drawn + (drawn >= newest), newest)
