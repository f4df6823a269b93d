"""The base of policies whose entries all have one size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmemory.banks.bank import Bank
from vmemory.banks.layout import largest_entries, state_bytes
from vmemory.banks.quantization import name_of
from vmemory.ops.grid_pool import grid_pool


class SingleTierBank(Bank):
    """A bank whose entries all have one size.

    Args:
        dim, grid, streams, device, dtype, key_dim, adapter: As in `Bank`.
        capacity: Entries held.
        grid_size: Token grid that frames are area-pooled to on entry; None = their own.
        budget: `"64MiB"` or bytes instead of `capacity`: the most entries whose `nbytes` stay within it.

    Raises:
        ValueError: An argument does not fit, not exactly one of `capacity` and `budget` is given, or the budget holds
            no frame.
    """

    # a key of `vmemory.reference.bank_layout.RULES`
    rule = ""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: int | None = None,
        *,
        grid_size: tuple[int, int] | None = None,
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
                return state_bytes(dim, grid, (n,), (grid_size,), self.rule, None, streams, dtype, key_dim)

            capacity = largest_entries(budget, 1, nbytes)
        assert capacity is not None
        super().__init__(
            dim, grid, (capacity,), (grid_size,), self.rule, streams=streams, device=device, dtype=dtype,
            key_dim=key_dim, adapter=adapter,
        )  # fmt: skip
        self._config = {
            "dim": dim,
            "grid": list(grid),
            "capacity": capacity,
            "grid_size": None if grid_size is None else list(grid_size),
            "streams": streams,
            "dtype": name_of(dtype),
            "key_dim": self.layout.key_dim,
        }

    def mean_of(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean `[S, key_dim]` of the cells of frames `[S, H, W, D]` that exist, in float32 or better."""
        keys = frames[..., : self.layout.key_dim]
        wide = self.descriptor.dtype
        if mask is None:
            return keys.mean((1, 2), dtype=wide)
        total = torch.where(mask[..., None], keys.to(wide), 0).sum((1, 2))
        return total / mask.sum((1, 2)).clamp_min(1)[:, None]

    def entering(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return frames `[S, H, W, D]` as the bank will hold them, `[S, n · D]`."""
        (H, W), (h, w) = self.layout.grid, self.layout.grids[0]
        if mask is None:
            return (frames if (h, w) == (H, W) else grid_pool(frames, (h, w))).flatten(1)
        maps = self.layout.packed_maps.to(frames.device, torch.promote_types(frames.dtype, torch.float32))
        rows, columns = maps[: h * H].view(h, H), maps[h * H : h * H + w * W].view(w, W)
        held = torch.einsum("ih,jw,shw->sij", rows, columns, mask.to(rows.dtype))[..., None]
        summed = torch.einsum("ih,jw,shwd->sijd", rows, columns, torch.where(mask[..., None], frames.to(rows.dtype), 0))
        return torch.where(held > 0, summed / held.clamp_min(1e-30), 0).to(frames.dtype).flatten(1)
