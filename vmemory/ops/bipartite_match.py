"""Bipartite soft matching of tokens, without storing the scores of all pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmemory.ops._checks import check_device, check_int, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import bipartite_match as _reference

_BACKENDS = Backends("bipartite_match")


class MergePlan(NamedTuple):
    """The rows of each merged token. M = groups · N rows in each of B / groups sequences, M' merged tokens.

    place `[B / groups, M]` int64: the merged token that contains each row. order `[B / groups, M]` int64: all rows,
    sorted by merged token. start `[B / groups, M' + 1]` int64: the rows of token j are
    `order[start[j] : start[j + 1]]`, first the row that keeps its position, then the rows merged into it, ascending.
    Row c · N + n is token n of the group's clip c.
    """

    place: Tensor
    order: Tensor
    start: Tensor
    groups: int

    @property
    def kept(self) -> Tensor:
        """`[B / groups, M']` int64: the row whose position each merged token has."""
        return self.order.gather(1, self.start[:, :-1])


def _fake(metric: Tensor, r: int, front: int, cls: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    streams, rows = metric.shape[0] // groups, groups * metric.shape[1]
    shapes = (streams, rows), (streams, rows), (streams, rows - r + 1)
    place, order, start = (metric.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return place, order, start


_forward = Op(
    "bipartite_match",
    "(Tensor metric, SymInt r, SymInt front, SymInt cls, SymInt groups) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def _check_match(metric: Tensor, r: int, protected: int, cls: int | None, groups: int) -> None:
    check_tensor("metric", metric, "[B, N, D]", floating=True)
    check_int("r", r, low=0)
    check_int("protected", protected, low=0, high=2)
    check_int("groups", groups, low=1)
    B, N, _ = metric.shape
    if B % groups:
        raise ValueError(f"groups: expected a divisor of the batch size {B}, got {groups}")
    if groups * N >= 2**31:
        raise ValueError(f"metric: expected fewer than 2**31 rows a group of {groups}, got shape {shape_of(metric)}")
    if cls is None:
        if protected and groups > 1:
            raise ValueError(f"protected: expected 0 with groups, where cls keeps rows in front, got {protected}")
        return
    check_int("cls", cls, low=0, high=N)
    if protected:
        raise ValueError(f"protected: expected 0 with cls, which protects the first rows itself, got {protected}")
    front, rows = groups * cls, groups * N
    evens, odds = (rows + 1) // 2 - (front + 1) // 2, rows // 2 - front // 2
    most = evens if odds else 0
    if r > most:
        raise ValueError(f"r: expected between 0 and {most}, the even rows from {front} to {rows}, got {r}")


def check_plan(plan: MergePlan) -> None:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: expected a MergePlan, as bipartite_match returns it, got {type(plan).__name__}")


@with_backends(_BACKENDS)
def bipartite_match(
    metric: Tensor,
    r: int,
    protected: int = 0,
    *,
    cls: int | None = None,
    groups: int = 1,
    similarity_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> MergePlan:
    """Match r tokens with the tokens they merge into, without storing the scores of all pairs.

    The even rows (A) and the odd rows (B) form two sets. Each row of A finds the row of B with the largest cosine, and
    the r rows of A with the largest cosines merge into their matches. The merged sequence consists of the leading rows,
    the unmerged rows of A and the rows of B, each in ascending order. With nothing to merge it is the sequence itself.

    Args:
        metric: `[B, N, D]`, the vectors that are compared, e.g. the mean key over the heads of an attention layer;
            float64, float32, float16 or bfloat16, any strides; every size may be 0.
        r: Tokens to merge, at least 0. Without `cls` at most (N − protected) // 2 take effect. With `cls`, more than
            the rows of A is an error.
        protected: Leading rows that do not merge and stay in front: 1 for a class token, 2 with a distillation token.
        cls: Instead of `protected`: the number of leading rows of each clip that are class tokens. A and B are the even
            and odd rows after them.
        groups: Neighbouring clips that are matched as one sequence of groups · N rows: first the class tokens of all
            clips, clip by clip, then all other tokens.
        similarity_dtype: Compare as code does that computes in this dtype, `torch.bfloat16` or `torch.float16`: rows,
            norms and scores are rounded to it. It stores all scores and runs the reference. None = float32 or better.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        A `MergePlan` for B / groups sequences. Scores are products of rows divided by max(norm, 1e-8), accumulated in
        float32 or better; a row of zeros scores 0. Ties: the lower row of B, the lower row of A. NaN is the largest
        score of all, in both choices. Not differentiable.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype or number.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: ToMe (ICLR 2023, arXiv 2210.09461) section 3; with `cls` and `groups` TempMe (ICLR 2025, arXiv 2409.01156)
    section 3. Both leave equal scores to an unstable sort, and a row of zeros to NaN. ToMe without a class token orders
    unmerged rows by score; here they always keep their order.
    """
    _check_match(metric, r, protected, cls, groups)
    rows = groups * metric.shape[1]
    if cls is None:
        r = min(r, max(0, rows - protected) // 2)
    front = rows if r == 0 else groups * cls if cls is not None else protected
    arguments = metric.detach(), r, front, cls or 0, groups
    if similarity_dtype is not None:
        if similarity_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"similarity_dtype: expected bfloat16, float16 or None, got {similarity_dtype}")
        return MergePlan(*_reference.bipartite_match(*arguments, similarity_dtype), groups)
    picked = _BACKENDS.pick(metric, impl)
    if picked == "reference":
        place, order, start = _reference.bipartite_match(*arguments)
    else:
        place, order, start = _forward(picked, *arguments)
    return MergePlan(place, order, start, groups)


def merge_source(plan: MergePlan, source: Tensor | None = None) -> Tensor:
    """Track which merged token contains each original token through several consecutive plans.

    Args:
        plan: The next plan, as `bipartite_match` returns it.
        source: `[B, N0]` int64, the result of this function for the previous plan: original token i of sequence b is
            part of its token `source[b, i]`. None before the first plan.

    Returns:
        `[B / groups, groups · N0]` int64, the merged token that contains each original token, clip after clip within a
        group.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype or device.

    Source: ToMe (arXiv 2210.09461), whose `merge_source` keeps a matrix of merged by original tokens instead.
    """
    check_plan(plan)
    if source is None:
        return plan.place
    check_tensor("source", source, "[B, N0]")
    streams, rows = plan.place.shape
    if source.dtype != torch.int64 or source.shape[0] != streams * plan.groups:
        want = f"int64 [{streams * plan.groups}, N0]"
        raise ValueError(f"source: expected {want} to fit plan, got {source.dtype} of shape {shape_of(source)}")
    check_device("source", source, "plan", plan.place)
    clip = torch.arange(plan.groups, device=source.device)[:, None] * (rows // plan.groups)
    joined = source.reshape(streams, plan.groups, source.shape[1]) + clip
    return plan.place.gather(1, joined.flatten(1))
