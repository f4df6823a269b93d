"""Banks of one tier: the last frames, evenly spread frames, merged neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmemory.banks.bank import Bank
from vmemory.banks.budget import largest_entries
from vmemory.banks.quantized import name_of
from vmemory.banks.tiers import state_bytes
from vmemory.ops.grid_pool import grid_pool


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

    def mean_of(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        """Return the mean `[S, key_dim]` of the cells of frames `[S, H, W, D]` that exist."""
        keys = frames[..., : self.layout.key_dim]
        if valid is None:
            return grid_pool(keys, 1, stats=True).mean
        wide = torch.where(valid[..., None], keys.to(torch.promote_types(keys.dtype, torch.float32)), 0)
        return wide.sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)[:, None]

    def entering(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        """Return frames `[S, H, W, D]` as the bank will hold them, `[S, n · D]`."""
        (H, W), (h, w) = self.layout.grid, self.layout.grids[0]
        if valid is None:
            return (frames if (h, w) == (H, W) else grid_pool(frames, (h, w))).flatten(1)
        maps = self.layout.packed_maps.to(frames.device, torch.promote_types(frames.dtype, torch.float32))
        rows, columns = maps[: h * H].view(h, H), maps[h * H : h * H + w * W].view(w, W)
        held = torch.einsum("ih,jw,shw->sij", rows, columns, valid.to(rows.dtype))[..., None]
        summed = torch.einsum(
            "ih,jw,shwd->sijd", rows, columns, torch.where(valid[..., None], frames.to(rows.dtype), 0)
        )
        return torch.where(held > 0, summed / held.clamp_min(1e-30), 0).to(frames.dtype).flatten(1)


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
    its span, the mean of its times and the number of its frames. With one token a frame and n entries it equals
    MA-LMM's bank of n − 1 and the newest frame beside it; with more tokens `TokenMergingBank` does. A frame with
    non-finite features leaves instead of being merged.

    Source: MA-LMM (arXiv 2404.05726) section 3.2; MovieChat (arXiv 2307.16449) merges neighbours by dot products and
    without weights.
    """

    policy = "merging"
    rule = "merge"
