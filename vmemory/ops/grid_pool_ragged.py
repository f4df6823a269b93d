"""Pool the token grids of a clip, each frame to a size of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_choice, check_pair, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.ops.grid_pool import check_grid
from vmemory.reference import grid_pool_ragged as _reference

_BACKENDS = Backends("grid_pool_ragged")


class RaggedGrid(NamedTuple):
    """Pooled frames of different sizes, concatenated."""

    tokens: Tensor
    """`[sum h*w, D]`, the input's dtype."""
    offsets: Tensor
    """`[T + 1]` int64 on the tokens' device: frame t owns rows `offsets[t]` to `offsets[t + 1]`, in raster order."""


def _fake(tokens: Tensor, sizes: list[int], mode: str) -> Tensor:
    rows = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    return tokens.new_empty((rows, tokens.shape[3]))


def _backward_fake(grad: Tensor, sizes: list[int], grid: list[int], mode: str) -> Tensor:
    return grad.new_empty((len(sizes) // 2, grid[0], grid[1], grad.shape[1]))


_forward = Op("grid_pool_ragged", "(Tensor tokens, int[] sizes, str mode) -> Tensor", _fake)
_backward = Op(
    "grid_pool_ragged_backward", "(Tensor grad, int[] sizes, int[] grid, str mode) -> Tensor", _backward_fake
)


class _GridPoolRagged(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, sizes: list[int], mode: str, impl: str) -> Tensor:
        ctx.sizes, ctx.grid, ctx.mode, ctx.impl = sizes, tokens.shape[1:3], mode, impl
        return _forward(impl, tokens, sizes, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(ctx.impl, grad, ctx.sizes, ctx.grid, ctx.mode), None, None, None


@with_backends(_BACKENDS)
def grid_pool_ragged(
    tokens: Tensor,
    sizes: Sequence[int | tuple[int, int]],
    mode: Literal["area", "bilinear"] = "area",
    *,
    impl: Impl = "auto",
) -> RaggedGrid:
    """Pool each frame of a clip `[T, H, W, D]` to a grid of its own size.

    Args:
        tokens: `[T, H, W, D]`, float64, float32, float16 or bfloat16, any strides.
        sizes: Per frame `(h, w)` or one int for both, at least 1; Python ints, because they determine the shape.
        mode: `"area"` or `"bilinear"`, as in `grid_pool`.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `RaggedGrid(tokens [sum h*w, D], offsets [T + 1])`, offsets int64. Tokens are differentiable once.

    Raises:
        TypeError: `tokens` is not a tensor, or an entry of `sizes` is neither an int nor a pair of ints.
        ValueError: Unsupported dtype, shape or mode, or not one size per frame.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: the per-frame sizes of VideoChat-Online (CVPR 2025), section 3.2; one launch instead of one per frame.
    """
    check_choice("mode", mode, ("area", "bilinear"))
    check_grid(tokens)
    if tokens.dim() != 4:
        raise ValueError(f"tokens: expected a tensor [T, H, W, D], got shape {shape_of(tokens)}")
    pairs = [check_pair(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    if len(pairs) != tokens.shape[0]:
        raise ValueError(f"sizes: expected one size per frame, {tokens.shape[0]}, got {len(pairs)}")
    offsets = torch.tensor([0, *accumulate(h * w for h, w in pairs)], dtype=torch.int64).to(tokens.device)
    picked = _BACKENDS.pick(tokens, impl)
    if picked == "reference":
        return RaggedGrid(_reference.grid_pool_ragged(tokens, pairs, mode), offsets)
    flat = [side for pair in pairs for side in pair]
    if torch.is_grad_enabled() and tokens.requires_grad:
        return RaggedGrid(_GridPoolRagged.apply(tokens, flat, mode, picked), offsets)
    return RaggedGrid(_forward(picked, tokens, flat, mode), offsets)
