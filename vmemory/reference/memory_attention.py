"""Attention of a frame's tokens over the valid slots of a memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.reference.quantize_slots import dequantize_slots


def memory_attention(
    query: Tensor,
    key_slots: Tensor,
    value_slots: Tensor,
    count: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Attend from `query [S, N, G, E]` to the first `min(count, M)` slots `[S, M, n, G, E]`.

    Returns `[S, N, G, E]`. Slots with scales `[S, M, n, G]` are stored as by `quantize_slots`. Computed in float32
    (float64 for float64) and rounded once. A stream without a valid slot gets zeros. Invalid slots may contain any
    value, NaN included, and get zero gradients.
    """
    slots, rows = key_slots.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    if key_scale is not None and value_scale is not None:
        key_slots = dequantize_slots(key_slots, key_scale, None, query.shape[-1], wide)
        value_slots = dequantize_slots(value_slots, value_scale, None, query.shape[-1], wide)
    valid = torch.arange(slots, device=query.device) < count[:, None]
    kept = valid[..., None, None, None]
    keys, values = (torch.where(kept, x.to(wide), 0).flatten(1, 2) for x in (key_slots, value_slots))
    # [S, G, N, M·n]
    scores = torch.einsum("snge,smge->sgnm", query.to(wide) * query.shape[-1] ** -0.5, keys)
    hidden = ~valid.repeat_interleave(rows, 1)[:, None, None]
    # softmax over -inf alone is NaN, so rows without a valid slot get zeros, and their result is not used
    empty = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden & ~empty, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("sgnm,smge->snge", weights, values).to(query.dtype)
