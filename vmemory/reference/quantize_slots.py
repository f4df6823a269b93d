"""Per-row symmetric quantisation to 8 or 4 bits, and back."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {8: 127, 4: 7}


def quantize_slots(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantise `x [..., D]` to int8 `[..., D]`, or uint8 `[..., ceil(D / 2)]` for 4 bits; float32 scales `[...]`.

    scale = max|x| / 127 (or 7); value = x / scale, rounded half to even. A scale that is not a normal number is
    replaced by 0, with values 0. A row that is not finite, or whose scale is not, has scale NaN and values 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = wide.abs().amax(-1) if x.shape[-1] > 0 else wide.new_zeros(x.shape[:-1])
    scale = (peak / LARGEST[bits]).to(torch.float32)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    scale = torch.where(scale.isfinite() & peak.isfinite(), scale, torch.nan)
    usable = scale > 0
    divisor = torch.where(usable, scale, 1).to(wide.dtype)[..., None]
    values = torch.where(usable[..., None], wide / divisor, 0)
    values = values.round().clamp(-LARGEST[bits], LARGEST[bits]).to(torch.int8)
    return (values if bits == 8 else pack(values)), scale


def pack(values: Tensor) -> Tensor:
    """Pack values as two's complement nibbles: the even channel in the low half of a byte, the odd one in the high."""
    padded = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    low, high = padded[..., ::2], padded[..., 1::2]
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack(packed: Tensor, dim: int) -> Tensor:
    """Unpack the first `dim` channels to int8."""
    bytes_ = packed.view(torch.int8)
    # an arithmetic shift right extends the sign
    return torch.stack([bytes_ << 4 >> 4, bytes_ >> 4], -1).flatten(-2)[..., :dim]


def dequantize_slots(
    values: Tensor, scale: Tensor, rows: Tensor | None, dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return values · scale `[..., dim]`, computed in float32 (float64 for float64).

    With `rows [S, N]` it returns these rows of `[S, M]` only, and zeros for rows that do not exist.
    """
    if rows is not None:
        there = (rows >= 0) & (rows < scale.shape[1])
        if scale.shape[1] == 0:
            return scale.new_zeros((*rows.shape, dim), dtype=dtype)
        at = torch.where(there, rows, 0)
        values = values.gather(1, at[..., None].expand(*at.shape, values.shape[-1])) * there[..., None]
        scale = torch.where(there, scale.gather(1, at), 0)
    wide = torch.promote_types(dtype, torch.float32)
    plain = values if values.dtype == torch.int8 else unpack(values, dim)
    return (plain.to(wide) * scale.to(wide)[..., None]).to(dtype)
