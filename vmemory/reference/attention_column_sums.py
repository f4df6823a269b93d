"""How much attention each key receives."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_column_sums(query: Tensor, key: Tensor, causal: bool = False) -> Tensor:
    """`query [S, N, G, E]` on `key [S, M, G, E]`: sums over the queries of softmax(q · k / √E), `[S, G, M]`.

    Computed in float32 (float64 for float64), which the result keeps. With `causal` query i sees keys up to i + M − N;
    one that sees none adds nothing.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("snge,smge->sgnm", query.to(wide) * query.shape[-1] ** -0.5, key.to(wide))
    if not causal:
        return scores.softmax(-1).sum(2)
    last = torch.arange(query.shape[1], device=query.device)[:, None] + key.shape[1] - query.shape[1]
    hidden = torch.arange(key.shape[1], device=query.device) > last
    # where nothing is seen, softmax gets zeros instead of -inf and its result is not used
    weights = scores.masked_fill(hidden & (last >= 0), -torch.inf).masked_fill(last < 0, 0).softmax(-1)
    return weights.masked_fill(hidden, 0).sum(2)
