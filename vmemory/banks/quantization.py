"""Store tokens in a floating dtype, or in 8 or 4 bits with a scale a token."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.ops.quantize_slots import dequantize_slots
from vmemory.reference.bank_layout import BankLayout, BankState

STORAGE = {"int8": torch.int8, "int4": torch.uint8}


def storage_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return what tokens are stored in: the dtype itself, int8 for `"int8"`, uint8 for `"int4"`.

    Raises:
        ValueError: Neither a floating dtype nor one of these names.
    """
    storage = STORAGE.get(dtype) if isinstance(dtype, str) else dtype
    if storage is None or not (storage.is_floating_point or isinstance(dtype, str)):
        raise ValueError(f"dtype: expected a floating dtype, 'int8' or 'int4', got {dtype!r}")
    return storage


def name_of(dtype: torch.dtype | str) -> str:
    """Return the dtype as files and command lines write it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype | str:
    """Return what `name_of` named.

    Raises:
        ValueError: No such dtype.
    """
    if name in STORAGE:
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected a floating dtype, 'int8' or 'int4', got {name!r}")
    return dtype


def new_state(layout: BankLayout, streams: int, device: torch.device | str, dtype: torch.dtype | str) -> BankState:
    """Make an empty memory.

    Raises:
        ValueError: As `storage_of`, or tiers whose reductions change a frame's mean cannot be stored in few bits.
    """
    storage = storage_of(dtype)
    if not storage.is_floating_point and layout.slots and layout.descriptors > 1:
        grids = ", ".join(map(str, layout.grids))
        raise ValueError(
            f"dtype: {dtype!r} expects grids whose reductions keep a frame's mean, such as halves, got {grids}"
        )
    return layout.new_state(streams, device, storage)


def read_tokens(state: BankState, rows: Tensor, dim: int) -> Tensor:
    """Return the tokens `[S, n, D]` of rows `[S, n]`; float32 where they are stored in 8 or 4 bits."""
    if state.quantized:
        return dequantize_slots(state.slots, state.scale, rows=rows, dim=dim)
    return state.slots.gather(1, rows[..., None].expand(-1, -1, dim))


def words(codes: Tensor) -> Tensor:
    """Return contiguous codes as int64 where their number allows: copies of eight bytes at a time are faster."""
    return codes.view(torch.int64) if codes.shape[-1] % 8 == 0 else codes
