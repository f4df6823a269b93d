"""Pool token grids with channels last, and compute the frames' means in the same pass."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_choice, check_pair, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import grid_pool as _reference

Mode = Literal["area", "bilinear", "pixel_shuffle_v1", "pixel_shuffle_v2"]
_MODES = ("area", "bilinear", "pixel_shuffle_v1", "pixel_shuffle_v2")


def _passed_over(impl: str, tokens: Tensor) -> str:
    return "Triton comes first for this op" if impl == "native" and tokens.is_cuda else ""


_BACKENDS = Backends("grid_pool", cuda=True, passed_over=_passed_over)


class PooledGrid(NamedTuple):
    """A pooled grid, and the mean and norm of the frame it was made from."""

    tokens: Tensor
    """`[..., h, w, D']`, the input's dtype."""
    mean: Tensor
    """`[..., D]`, float32 (float64 for float64): mean of the input over its H×W cells."""
    norm: Tensor
    """`[...]`, same dtype: Euclidean norm of `mean`."""


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_grid(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a tensor [..., H, W, D], got {type(tokens).__name__}")
    check_tensor("tokens", tokens, "[..., H, W, D]", dims=max(3, tokens.dim()), floating=True)
    if tokens.shape[-3] < 1 or tokens.shape[-2] < 1:
        raise ValueError(f"tokens: expected a grid of at least 1 cell [..., H, W, D], got shape {shape_of(tokens)}")


def _pooled_shape(tokens: Tensor, size: list[int], mode: str) -> tuple[Any, ...]:
    return tokens.shape[0], size[0], size[1], tokens.shape[3] * (4 if mode.startswith("pixel") else 1)


def _fake(tokens: Tensor, size: list[int], mode: str) -> Tensor:
    return tokens.new_empty(_pooled_shape(tokens, size, mode))


def _stats_fake(tokens: Tensor, size: list[int], mode: str) -> tuple[Tensor, Tensor, Tensor]:
    frames, channels, wide = tokens.shape[0], tokens.shape[3], wide_dtype(tokens)
    pooled = tokens.new_empty(_pooled_shape(tokens, size, mode))
    return pooled, tokens.new_empty((frames, channels), dtype=wide), tokens.new_empty((frames,), dtype=wide)


def _backward_fake(grad: Tensor, cell: Tensor | None, grid: list[int], mode: str) -> Tensor:
    channels = grad.shape[3] // 4 if mode.startswith("pixel") else grad.shape[3]
    return grad.new_empty((grad.shape[0], grid[0], grid[1], channels))


_forward = Op("grid_pool", "(Tensor tokens, int[] size, str mode) -> Tensor", _fake)
_stats = Op(
    "grid_pool_stats",
    "(Tensor tokens, int[] size, str mode) -> (Tensor, Tensor, Tensor)",
    _stats_fake,
    stem="grid_pool",
)
# `cell [B, D]` holds the gradients of mean and norm; it is added to every cell of its frame
_backward = Op("grid_pool_backward", "(Tensor grad, Tensor? cell, int[] grid, str mode) -> Tensor", _backward_fake)


class _GridPool(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, size: tuple[int, int], mode: str, impl: str) -> Tensor:
        ctx.grid, ctx.mode, ctx.impl = tokens.shape[1:3], mode, impl
        return _forward(impl, tokens, size, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(ctx.impl, grad, None, ctx.grid, ctx.mode), None, None, None


class _GridPoolStats(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, size: tuple[int, int], mode: str, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        pooled, mean, norm = _stats(impl, tokens, size, mode)
        ctx.grid, ctx.mode, ctx.impl = tokens.shape[1:3], mode, impl
        ctx.save_for_backward(mean, norm)
        return pooled, mean, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_norm: Tensor) -> tuple[Tensor, None, None, None]:
        mean, norm = ctx.saved_tensors
        along = torch.where(norm == 0, 0, grad_norm / norm)[:, None]
        cell = (grad_mean + along * mean) / (ctx.grid[0] * ctx.grid[1])
        return _backward(ctx.impl, grad, cell, ctx.grid, ctx.mode), None, None, None


def _check_size(tokens: Tensor, size: int | tuple[int, int], mode: str) -> tuple[int, int]:
    pair = check_pair("size", size)
    if not mode.startswith("pixel"):
        return pair
    height, width = tokens.shape[-3:-1]
    if height % 2 or width % 2:
        raise ValueError(f"tokens: expected even H and W for mode {mode!r}, got shape {shape_of(tokens)}")
    expected = (width // 2, height // 2) if mode == "pixel_shuffle_v1" else (height // 2, width // 2)
    if pair != expected:
        raise ValueError(f"size: expected {expected} for mode {mode!r} and shape {shape_of(tokens)}, got {pair}")
    return pair


@overload
def grid_pool(
    tokens: Tensor, size: int | tuple[int, int], mode: Mode = ..., *, stats: Literal[False] = ..., impl: Impl = ...
) -> Tensor: ...
@overload
def grid_pool(
    tokens: Tensor, size: int | tuple[int, int], mode: Mode = ..., *, stats: Literal[True], impl: Impl = ...
) -> PooledGrid: ...
@with_backends(_BACKENDS)
def grid_pool(
    tokens: Tensor, size: int | tuple[int, int], mode: Mode = "area", *, stats: bool = False, impl: Impl = "auto"
) -> Tensor | PooledGrid:
    """Pool token grids `[..., H, W, D]` to `[..., h, w, D]` without permuting them.

    Args:
        tokens: `[..., H, W, D]`, float64, float32, float16 or bfloat16, any strides; frames and D may be 0.
        size: `(h, w)` or one int for both, at least 1; may exceed `(H, W)`.
        mode: `"area"`: the mean over `adaptive_avg_pool2d`'s windows. `"bilinear"`: `interpolate(align_corners=False)`
            without antialiasing. `"pixel_shuffle_v2"`: each 2×2 block of cells becomes one cell `[..., H/2, W/2, 4D]`,
            the block's cells in raster order; `"pixel_shuffle_v1"`: the same with the two axes of the output swapped,
            `[..., W/2, H/2, 4D]`. Both need even H and W, and `size` must be this grid.
        stats: Also return the mean of each input frame and its norm, from the same pass over the tokens.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        The pooled tokens in the dtype of `tokens`, or `PooledGrid(tokens, mean, norm)` with `mean [..., D]` and
        `norm [...]` in float32 (float64 for float64). Sums are kept in float32 or better. All are differentiable once;
        the gradient of a norm of 0 is 0.

    Raises:
        TypeError: `tokens` is not a tensor, or `size` is neither an int nor a pair of ints.
        ValueError: Unsupported dtype, shape, size or mode.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: VideoChat-Online (CVPR 2025), section 3.2, for area pooling and both orders of pixel shuffling.
    """
    check_choice("mode", mode, _MODES)
    check_grid(tokens)
    pair = _check_size(tokens, size, mode)
    picked = _BACKENDS.pick(tokens, impl)
    if picked == "reference":
        pooled = _reference.grid_pool(tokens, pair, mode)
        return PooledGrid(pooled, *_reference.frame_stats(tokens)) if stats else pooled
    flat = tokens.unsqueeze(0).flatten(0, -4)
    tracked = torch.is_grad_enabled() and tokens.requires_grad
    front = tokens.shape[:-3]
    if not stats:
        pooled = _GridPool.apply(flat, pair, mode, picked) if tracked else _forward(picked, flat, pair, mode)
        return cast(Tensor, pooled).reshape(*front, *pooled.shape[1:])
    run = _GridPoolStats.apply(flat, pair, mode, picked) if tracked else _stats(picked, flat, pair, mode)
    pooled, mean, norm = run
    mean = mean.reshape(*front, mean.shape[-1])
    return PooledGrid(pooled.reshape(*front, *pooled.shape[1:]), mean, norm.reshape(front))
