"""The k most similar rows of a memory, by sorting every score."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-8


def similarity_topk(
    query: Tensor,
    memory: Tensor,
    k: int,
    count: Tensor | None = None,
    where: Tensor | None = None,
    metric: str = "cosine",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`query [S, Q, D]` against `memory [S, M, D]`: values and indices `[S, Q, k]`, best first, lower index first.

    A NaN score is the largest of all. Places that cannot be filled are −inf / −1.
    """
    S, Q, _ = query.shape
    M = memory.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    q, m = query.to(wide), memory.to(wide)
    if scale is not None:
        m = m * scale[..., None].to(wide)
    # one multiply and one sum a row, not a matrix product: equal rows get equal scores wherever they lie
    scores = torch.stack([(q[:, i, None] * m).sum(-1) for i in range(Q)], 1) if Q else q.new_zeros(S, 0, M)
    if metric == "cosine":
        norms = q.norm(dim=-1).clamp_min(_EPS)[..., None] * m.norm(dim=-1).clamp_min(_EPS)[:, None]
        scores = scores / norms
    valid = torch.ones(S, M, dtype=torch.bool, device=query.device)
    if count is not None:
        valid &= torch.arange(M, device=query.device) < count[:, None]
    if where is not None:
        valid &= where
    valid = valid[:, None].expand(S, Q, M)
    values, index = torch.where(valid, scores, -torch.inf).sort(dim=-1, descending=True, stable=True)
    # a searched slot may score −inf itself: it still comes before those that were not searched
    searched = valid.gather(-1, index)
    rank = searched.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    values, index, searched = (x.gather(-1, rank)[..., :k] for x in (values, index, searched))
    index = torch.where(searched, index, -1)
    missing = k - index.shape[-1]
    if missing > 0:
        values = torch.cat([values, values.new_full((S, Q, missing), -torch.inf)], -1)
        index = torch.cat([index, index.new_full((S, Q, missing), -1)], -1)
    return values, index
