"""Find the k most similar rows of a memory by sorting all scores."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.reference.quantize_slots import unpack

_EPS = 1e-8


def _rows(memory: Tensor, scale: Tensor | None, dim: int, wide: torch.dtype) -> Tensor:
    rows = (unpack(memory, dim) if memory.dtype == torch.uint8 else memory).to(wide)
    return rows if scale is None else rows * scale[..., None].to(wide)


def similarity_topk(
    query: Tensor,
    memory: Tensor,
    k: int,
    count: Tensor | None = None,
    where: Tensor | None = None,
    metric: str = "cosine",
    scale: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return values and indices `[S, Q, k]` for `query [S, Q, D]` and `memory [S, M, D]`, best and lowest index first.

    `norm [S, M]` are the rows' norms if the caller stores them. Packed rows in uint8, `[S, M, ceil(D / 2)]`, are stored
    as by `quantize_slots`. A NaN score is the largest of all.
    Places that cannot be filled are −inf / −1. Slots that are not searched may hold anything, NaN included.
    """
    S, Q, D = query.shape
    M = memory.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    valid = torch.ones(S, M, dtype=torch.bool, device=query.device)
    if count is not None:
        valid &= torch.arange(M, device=query.device) < count[:, None]
    if where is not None:
        valid &= where
    q, m = query.to(wide), torch.where(valid[..., None], _rows(memory, scale, D, wide), 0)
    # not a matrix product, because its order of summation depends on the row: equal rows must have equal scores
    scores = torch.stack([(q[:, i, None] * m).sum(-1) for i in range(Q)], 1) if Q else q.new_zeros(S, 0, M)
    if metric == "cosine":
        row_norm = m.norm(dim=-1) if norm is None else torch.where(valid, norm, 0)
        scores = scores / (q.norm(dim=-1).clamp_min(_EPS)[..., None] * row_norm.clamp_min(_EPS)[:, None])
    valid = valid[:, None].expand(S, Q, M)
    values, index = torch.where(valid, scores, -torch.inf).sort(dim=-1, descending=True, stable=True)
    # a searched slot may score −inf; it still comes before slots that were not searched
    searched = valid.gather(-1, index)
    rank = searched.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    values, index, searched = (x.gather(-1, rank)[..., :k] for x in (values, index, searched))
    index = torch.where(searched, index, -1)
    missing = k - index.shape[-1]
    if missing > 0:
        values = torch.cat([values, values.new_full((S, Q, missing), -torch.inf)], -1)
        index = torch.cat([index, index.new_full((S, Q, missing), -1)], -1)
    return values, index


def similarity_topk_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    query: Tensor,
    memory: Tensor,
    scale: Tensor | None,
    metric: str,
    for_query: bool,
    for_memory: bool,
) -> tuple[Tensor, Tensor]:
    """Return gradients of the values `[S, Q, k]` with respect to query and memory; empty if not required.

    d cos / d a = b / (|a| |b|) − cos · a / |a|²; without the second term if |a| is clamped and thus constant.
    """
    q, there, slot = query.to(values.dtype), indices >= 0, indices.clamp_min(0).flatten(1)[..., None]
    slot = slot.expand(-1, -1, query.shape[2])
    every = _rows(memory, scale, query.shape[2], values.dtype)
    found = every.gather(1, slot) if memory.shape[1] else q.new_zeros(slot.shape)
    rows = found.reshape(*indices.shape, query.shape[2])
    across = torch.where(there, grad, 0)
    into_query, into_rows = torch.zeros_like(across[..., :1]), torch.zeros_like(across)
    if metric == "cosine":
        query_norm, row_norm = q.norm(dim=-1)[..., None], rows.norm(dim=-1)
        a, b = query_norm.clamp_min(_EPS), row_norm.clamp_min(_EPS)
        along = torch.where(there, grad * values, 0)
        into_query = torch.where(query_norm < _EPS, 0, (along / (a * a)).sum(-1, keepdim=True))
        into_rows = torch.where(row_norm < _EPS, 0, along / (b * b))
        across = across / (a * b)
    to_query = to_memory = query.new_empty(0)
    if for_query:
        to_query = ((across[..., None] * rows).sum(2) - into_query * q).to(query.dtype)
    if for_memory:
        share = torch.where(there[..., None], across[..., None] * q[:, :, None] - into_rows[..., None] * rows, 0)
        to_memory = values.new_zeros(memory.shape)
        if memory.shape[1]:
            to_memory = to_memory.scatter_add(1, slot, share.flatten(1, 2))
    return to_query, to_memory.to(query.dtype)
