"""Column sums of an attention map."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_column_sums(query: Tensor, key: Tensor, causal: bool = False) -> Tensor:
    """Return sums `[S, G, M]` over the queries of softmax(q · k / √E), `query [S, N, G, E]`, `key [S, M, G, E]`.

    Computed and returned in float32 (float64 for float64). With `causal` query i sees keys up to i + M − N; a query
    that sees no key adds nothing.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("snge,smge->sgnm", query.to(wide) * query.shape[-1] ** -0.5, key.to(wide))
    if not causal:
        return scores.softmax(-1).sum(2)
    last = torch.arange(query.shape[1], device=query.device)[:, None] + key.shape[1] - query.shape[1]
    hidden = torch.arange(key.shape[1], device=query.device) > last
    # softmax over -inf alone is NaN, so rows that see no key get zeros, and their result is not used
    weights = scores.masked_fill(hidden & (last >= 0), -torch.inf).masked_fill(last < 0, 0).softmax(-1)
    return weights.masked_fill(hidden, 0).sum(2)
