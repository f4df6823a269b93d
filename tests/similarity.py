"""Searches that are hard to get right, and how their results are judged."""

from __future__ import annotations

import torch

from vmemory.reference import similarity_topk as reference
from vmemory.testing import assert_within_budget, random_tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
METRICS = ("cosine", "dot")
NAN, INF = float("nan"), float("inf")
# S, Q, M, D, k
SHAPES = [
    (1, 1, 1000, 33, 7),
    (2, 3, 300, 64, 5),
    (3, 1, 70, 16, 100),
    (1, 8, 513, 40, 1),
    (1, 2, 1500, 24, 1024),
    (2, 64, 260, 20, 12),
    (1, 1, 1, 1, 1),
    (0, 2, 5, 4, 3),
    (2, 0, 5, 4, 3),
    (2, 3, 0, 4, 3),
    (2, 3, 50, 0, 4),
]


def memory_with_ties(S: int, M: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Rows `[S, M, D]`, some of them repeated at odd places and across the middle, and two of zeros."""
    x = random_tensor(S, M, D, dtype=dtype, seed=seed)
    for target in (1, 8, M // 2 - 1, M // 2, M // 2 + 3, M - 1):
        if 0 <= target < M:
            x[:, target] = x[:, M // 3]
    if M > 12:
        x[:, [5, 11]] = 0
    return x


def int8_memory(S: int, M: int, D: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    rows = memory_with_ties(S, M, D, seed=seed)
    scale = rows.abs().amax(-1).clamp_min(1e-3) / 127 if D else rows.new_ones(S, M)
    return (rows / scale[..., None]).round().to(torch.int8), scale


def filters(S: int, M: int, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = torch.tensor([M * 3 // 4, M + 9, 0, -2])[torch.arange(S) % 4]
    return {"count": count, "where": torch.rand(S, M, generator=generator) > 0.3}


def norms_of(memory: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What `norm` takes beside queries of `dtype`."""
    rows = memory.double() if scale is None else memory.double() * scale[..., None]
    return rows.norm(dim=-1).to(torch.promote_types(dtype, torch.float32))


def assert_finds(actual, query, memory, k, metric="cosine", count=None, where=None, scale=None):
    """Values by the budget; slots exactly wherever the float64 scores differ by more than the budget, or not at all."""
    wide_memory = memory if memory.dtype == torch.int8 else memory.double()
    low = reference.similarity_topk(query, memory, k, count, where, metric, scale)
    # every score, so that the neighbours of the last place are seen
    wide = reference.similarity_topk(query.double(), wide_memory, k + memory.shape[1], count, where, metric, scale)
    expected = wide[0][..., :k]
    # a sum is as good as the rounding of its terms, however small it turns out
    terms = query.double().norm(dim=-1).amax().item() if query.numel() else 0.0
    rows = wide_memory.double() if scale is None else wide_memory.double() * scale[..., None]
    if metric == "dot":
        terms *= rows.nan_to_num(0, 0, 0).norm(dim=-1).amax().item() if rows.numel() else 0.0
    else:
        terms = 1.0
    unit = torch.tensor([terms])
    ours, plain, truth = (torch.cat([x.flatten().cpu(), unit.to(x.dtype)]) for x in (actual[0], low[0], expected))
    assert actual[1].dtype == torch.int64
    assert actual[1].shape == actual[0].shape == (*query.shape[:2], k)
    assert_within_budget(ours, plain, truth)
    finite = torch.isfinite(plain) & torch.isfinite(truth)
    error = (plain[finite].double() - truth[finite].double()).abs().max().item()
    bound = 4 * (error + torch.finfo(actual[0].dtype).eps * terms)
    # NaN and −inf are each one score
    gap = wide[0][..., :-1] - wide[0][..., 1:]
    gap = torch.where(wide[0][..., :-1].isnan(), torch.where(wide[0][..., 1:].isnan(), 0.0, INF), gap).nan_to_num(
        0, INF
    )
    # different rows may tie in float64 alone
    at = (gap == 0).nonzero(as_tuple=True)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    first, second = (padded[at[0], side[at]] for side in (wide[1][..., :-1], wide[1][..., 1:]))
    alike = (first == second).all(-1) | (~wide[0][..., 1:].isfinite())[at]
    gap[at] = torch.where(alike, 0.0, bound / 2).to(gap)
    cluster = torch.nn.functional.pad((gap > bound).cumsum(-1), (1, 0))
    unsure = torch.zeros_like(wide[1]).scatter_add(-1, cluster[..., 1:], ((gap > 0) & (gap <= bound)).long())
    decided = unsure.gather(-1, cluster)[..., :k] == 0
    assert torch.equal(actual[1][decided], wide[1][..., :k][decided])
    return decided
