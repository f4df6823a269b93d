"""The base of policies whose entries all have one size."""

from __future__ import annotations

import torch
from torch import nn

from vmemory.banks.bank import Bank
from vmemory.banks.layout import largest_entries, state_bytes
from vmemory.banks.quantization import name_of


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
