"""Merge tokens by a plan, spread them back, and compute the attention bias of merged tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_device, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.ops.bipartite_match import MergePlan, check_plan
from vmemory.reference import token_merge as _reference

_STEM = "token_merge"


def _passed_over(impl: str, tokens: Tensor) -> str:
    return "Triton comes first for this op" if impl == "native" and tokens.is_cuda else ""


_MERGE = Backends("token_merge", cuda=True, passed_over=_passed_over)
_UNMERGE = Backends("token_unmerge", cuda=True, passed_over=_passed_over)


class MergedTokens(NamedTuple):
    """Tokens x `[B / groups, M', D]` and size `[B / groups, M', 1]`, the number of original tokens in each."""

    x: Tensor
    size: Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_merge(x: Tensor, size: Tensor | None, order: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    streams, tokens = start.shape[0], start.shape[1] - 1
    return x.new_empty((streams, tokens, x.shape[2])), x.new_empty((streams, tokens), dtype=_wide(x))


def _fake_merge_backward(grad: Tensor, size: Tensor | None, total: Tensor, place: Tensor, start: Tensor) -> Tensor:
    return grad.new_empty((*place.shape, grad.shape[2]))


def _fake_unmerge(x: Tensor, place: Tensor) -> Tensor:
    return x.new_empty((*place.shape, x.shape[2]))


def _fake_unmerge_backward(grad: Tensor, order: Tensor, start: Tensor) -> Tensor:
    return grad.new_empty((start.shape[0], start.shape[1] - 1, grad.shape[2]))


_merge = Op(
    "token_merge", "(Tensor x, Tensor? size, Tensor order, Tensor start) -> (Tensor, Tensor)", _fake_merge, stem=_STEM
)
_merge_backward = Op(
    "token_merge_backward",
    "(Tensor grad, Tensor? size, Tensor total, Tensor place, Tensor start) -> Tensor",
    _fake_merge_backward,
    stem=_STEM,
)
_unmerge = Op("token_unmerge", "(Tensor x, Tensor place) -> Tensor", _fake_unmerge, stem=_STEM)
_unmerge_backward = Op(
    "token_unmerge_backward", "(Tensor grad, Tensor order, Tensor start) -> Tensor", _fake_unmerge_backward, stem=_STEM
)


class _TokenMerge(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, size: Tensor | None, place: Tensor, order: Tensor, start: Tensor, impl: str
    ) -> tuple[Tensor, Tensor]:
        merged, total = _merge(impl, x, size, order, start)
        ctx.impl = impl
        ctx.save_for_backward(size, total, place, start)
        ctx.mark_non_differentiable(total)
        return merged, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _merge_backward(ctx.impl, grad, *ctx.saved_tensors), *(None,) * 5


class _TokenUnmerge(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, order: Tensor, start: Tensor, impl: str) -> Tensor:
        ctx.impl = impl
        ctx.save_for_backward(order, start)
        return _unmerge(impl, x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _unmerge_backward(ctx.impl, grad, *ctx.saved_tensors), *(None,) * 4


@with_backends(_MERGE)
def token_merge(x: Tensor, plan: MergePlan, size: Tensor | None = None, *, impl: Impl = "auto") -> MergedTokens:
    """Replace the tokens that a plan merges by their size-weighted means.

    Args:
        x: `[B, N, D]` of the metric's B and N, float64, float32, float16 or bfloat16, any strides. The clips of a
            group need not be joined before.
        plan: As `bipartite_match` returns it, on the device of `x`.
        size: `[B, N, 1]`, the number of original tokens in each token, not negative; float32 (float64 for a float64
            `x`). None = 1 for all.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `MergedTokens(x [B / groups, M', D], size [B / groups, M', 1])`, M' = groups · N − r. An unmerged token is
        unchanged, bit for bit. Tokens whose sizes sum to 0 have equal weights. Means are accumulated in float32 or
        better. Differentiable in `x`, not in `size`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype or device.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: ToMe (ICLR 2023, arXiv 2210.09461) section 3, "tracking token size".
    """
    check_tensor("x", x, "[B, N, D]", floating=True)
    check_plan(plan)
    streams, rows = plan.place.shape
    if x.shape[0] != streams * plan.groups or x.shape[1] * plan.groups != rows:
        want = f"[{streams * plan.groups}, {rows // plan.groups}, D]"
        raise ValueError(f"x: expected {want} to fit plan, got shape {shape_of(x)}")
    check_device("plan", plan.place, "x", x)
    joined = x.reshape(streams, rows, x.shape[2])
    held = None
    if size is not None:
        check_tensor("size", size, "[B, N, 1]")
        if size.shape != (*x.shape[:2], 1):
            raise ValueError(f"size: expected [{x.shape[0]}, {x.shape[1]}, 1], got shape {shape_of(size)}")
        if size.dtype != _wide(x):
            raise ValueError(f"size: expected {_wide(x)}, got {size.dtype}")
        check_device("size", size, "x", x)
        held = size.detach().reshape(streams, rows)
    picked = _MERGE.pick(x, impl)
    if picked == "reference":
        merged, total = _reference.token_merge(joined, held, plan.place, plan.start.shape[1] - 1)
    elif torch.is_grad_enabled() and x.requires_grad:
        merged, total = _TokenMerge.apply(joined, held, plan.place, plan.order, plan.start, picked)
    else:
        merged, total = _merge(picked, joined, held, plan.order, plan.start)
    return MergedTokens(merged, total[..., None])


@with_backends(_UNMERGE)
def token_unmerge(x: Tensor, plan: MergePlan, *, impl: Impl = "auto") -> Tensor:
    """Spread merged tokens back over the original rows: each row gets the token that contains it.

    Args:
        x: `[B / groups, M', D]`, as `token_merge` returns it, float64, float32, float16 or bfloat16, any strides.
        plan: The plan by which `x` was merged, on the device of `x`.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[B, N, D]`. Differentiable in `x`: the gradient of a token is the sum over its rows.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unsupported shape, dtype or device.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: ToMe's unmerging for dense tasks (arXiv 2303.17604). With two protected rows ToMe's released code reads the
    tokens of a sequence in another order than it wrote them; here every token returns to its own rows.
    """
    check_tensor("x", x, "[B, N, D]", floating=True)
    check_plan(plan)
    streams, rows = plan.place.shape
    tokens = plan.start.shape[1] - 1
    if x.shape[:2] != (streams, tokens):
        raise ValueError(f"x: expected [{streams}, {tokens}, D] to fit plan, got shape {shape_of(x)}")
    check_device("plan", plan.place, "x", x)
    picked = _UNMERGE.pick(x, impl)
    if picked == "reference":
        out = _reference.token_unmerge(x, plan.place)
    elif torch.is_grad_enabled() and x.requires_grad:
        out = _TokenUnmerge.apply(x, plan.place, plan.order, plan.start, picked)
    else:
        out = _unmerge(picked, x, plan.place)
    return out.reshape(streams * plan.groups, rows // plan.groups, x.shape[2])


def proportional_attention_bias(size: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the additive attention mask that weights a merged token by its number of original tokens.

    Args:
        size: `[B, N, 1]`, as `token_merge` returns it.
        dtype: The dtype of the result, for `scaled_dot_product_attention` that of the query; `size`'s by default.

    Returns:
        log(size) as `[B, 1, 1, N]`, to be passed as `attn_mask` or added to one: softmax(q · k · scale + log(size)).
        A key of size 0 gets −inf and is not attended to.

    Raises:
        TypeError: `size` is not a tensor.
        ValueError: Unsupported shape or dtype.

    Source: ToMe (ICLR 2023, arXiv 2210.09461) equation 1.
    """
    check_tensor("size", size, "[B, N, 1]", floating=True)
    if size.shape[2] != 1:
        raise ValueError(f"size: expected [B, N, 1], got shape {shape_of(size)}")
    return size.detach().log().to(size.dtype if dtype is None else dtype).transpose(1, 2)[:, None]
