"""Banks of one tier: the last frames, evenly spread frames, merged neighbours."""

from __future__ import annotations

import torch
from torch import nn

from vmemory.banks.bank import Bank
from vmemory.banks.budget import largest_entries
from vmemory.banks.quantized import name_of
from vmemory.banks.tiers import state_bytes


class SingleTierBank(Bank):
    """A bank whose entries all have one size.

    Args:
        dim, grid, streams, device, dtype, key_dim, adapter: As in `Bank`.
        capacity: Entries held.
        pooled: Token grid that frames are area-pooled to on entry; None = their own.
        budget: `"64MiB"` or bytes instead of `capacity`: the most entries whose `nbytes` stay within it.

    Raises:
        ValueError: An argument does not fit, not exactly one of `capacity` and `budget` is given, or the budget holds
            no frame.
    """

    rule = ""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: int | None = None,
        *,
        pooled: tuple[int, int] | None = None,
        budget: str | int | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        key_dim: int | None = None,
        adapter: nn.Module | None = None,
    ) -> None:
        if (capacity is None) == (budget is None):
            raise ValueError("capacity: expected exactly one of capacity and budget")
        if budget is not None:

            def nbytes(n: int) -> int:
                return state_bytes(dim, grid, (n,), (pooled,), self.rule, None, streams, dtype, key_dim)

            capacity = largest_entries(budget, 1, nbytes)
        assert capacity is not None
        super().__init__(
            dim, grid, (capacity,), (pooled,), self.rule, streams=streams, device=device, dtype=dtype, key_dim=key_dim,
            adapter=adapter,
        )  # fmt: skip
        self._config = {
            "dim": dim,
            "grid": list(grid),
            "capacity": capacity,
            "pooled": None if pooled is None else list(pooled),
            "streams": streams,
            "dtype": name_of(dtype),
            "key_dim": self.layout.key_dim,
        }


class RingBank(SingleTierBank):
    """The last `capacity` frames: first in, first out.

    Source: the baseline of SimpleStream (arXiv 2604.02317) and VLM²'s working memory (arXiv 2511.20644).
    """

    policy = "recent"
    rule = "recent"


class UniformBank(SingleTierBank):
    """Frames spread evenly over all that was seen, without knowing how long the stream will be.

    A full bank gives up the frame whose neighbours lie closest together, the earliest of equals, never the first.
    """

    policy = "uniform"
    rule = "uniform"


class MergingBank(SingleTierBank):
    """Neighbouring frames merged where they are most alike, each kept as the weighted mean of its span.

    A full bank folds the closest pair of list neighbours into one entry before the next frame enters; the entry keeps
    its span, the mean of its times and the number of its frames. Holding n entries it equals MA-LMM's bank of n − 1
    and the newest frame beside it. A frame with non-finite features leaves instead of being merged.

    Source: MA-LMM (arXiv 2404.05726) section 3.2, MovieChat (arXiv 2307.16449).
    """

    policy = "merging"
    rule = "merge"
