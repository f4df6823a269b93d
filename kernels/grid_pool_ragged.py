"""Pool the token grids of a clip to one size per frame, in one launch.

The launch has programs for the largest size; programs that a smaller frame does not need return at once.
"""

from __future__ import annotations

from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, from_host, jit, power_of_two
from vmemory.kernels.grid_pool import backward_tap, backward_taps, forward_taps, pool_tile


@jit
def _grid_pool_ragged_fwd_kernel(
    x, table, out, H, W, D, ROWS: tl.constexpr, AREA: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    frame, i = (tl.program_id(0) // ROWS).to(tl.int64), (tl.program_id(0) % ROWS).to(tl.int64)
    h, w, first = tl.load(table + frame * 3), tl.load(table + frame * 3 + 1), tl.load(table + frame * 3 + 2)
    cells = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    if (i >= h) | (tl.program_id(1) * BLOCK_J >= w):
        return
    d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    # a side of 1 comes as a constant, which has no .to
    x += frame * H * W * D
    tile = pool_tile(x, i, cells, d, H, W, h, w, D, AREA, KH, KW, BLOCK_J, BLOCK_D)
    mask = (cells < w)[:, None] & (d < D)[None, :]
    tl.store(out + (first + i * w + cells)[:, None] * D + d[None, :], tile.to(out.dtype.element_ty), mask)


@jit
def _grid_pool_ragged_bwd_kernel(
    grad, table, out, H, W, D, AREA: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    frame, y = row // H, row % H
    h, w, first = tl.load(table + frame * 3), tl.load(table + frame * 3 + 1), tl.load(table + frame * 3 + 2)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    # a side of 1 comes as a constant, which has no .to
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for ky in range(KH):
        i, wy, in_y = backward_tap(y, ky, H, h, AREA)
        live = (columns < W)[:, None] & (d < tl.where(in_y, D, 0))[None, :]
        for kx in range(KW):
            j, wx, in_x = backward_tap(columns, kx, W, w, AREA)
            source = grad + (first + i * w + j)[:, None] * D + d[None, :]
            value = tl.load(source, live & in_x[:, None], other=0.0).to(tl.float32)
            total += value * (wy * wx)[:, None]
    mask = (columns < W)[:, None] & (d < D)[None, :]
    tl.store(out + (row * W + columns)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask)


def _table(sizes: list[int], like: Tensor) -> Tensor:
    heights, widths = sizes[::2], sizes[1::2]
    first = [0, *accumulate(h * w for h, w in zip(heights, widths, strict=True))]
    rows = [value for row in zip(heights, widths, first, strict=False) for value in row]
    return from_host(rows, like)


def grid_pool_ragged(tokens: Tensor, sizes: list[int], mode: str) -> Tensor:
    x = tokens.contiguous()
    frames, height, width, channels = x.shape
    heights, widths = sizes[::2], sizes[1::2]
    out = x.new_empty((sum(h * w for h, w in zip(heights, widths, strict=True)), channels))
    if out.numel() == 0:
        return out
    rows, block_j, block_d = max(heights), min(4, power_of_two(max(widths))), channel_block(channels, 256)
    with device_of(x):
        launch = (frames * rows, triton.cdiv(max(widths), block_j), triton.cdiv(channels, block_d))
        _grid_pool_ragged_fwd_kernel[launch](
            x, _table(sizes, x), out, height, width, channels, ROWS=rows, AREA=mode == "area",
            KH=max(forward_taps(mode, height, h) for h in heights),
            KW=max(forward_taps(mode, width, w) for w in widths), BLOCK_J=block_j, BLOCK_D=block_d,
        )  # fmt: skip
    return out


def grid_pool_ragged_backward(grad: Tensor, sizes: list[int], grid: list[int], mode: str) -> Tensor:
    g = grad.contiguous()
    frames, (height, width), channels = len(sizes) // 2, grid, g.shape[1]
    out = g.new_empty((frames, height, width, channels))
    if out.numel() == 0:
        return out
    block_x, block_d = min(4, power_of_two(width)), channel_block(channels, 256)
    with device_of(g):
        _grid_pool_ragged_bwd_kernel[(frames * height, triton.cdiv(width, block_x), triton.cdiv(channels, block_d))](
            g, _table(sizes, g), out, height, width, channels, AREA=mode == "area",
            KH=max(backward_taps(mode, height, h) for h in sizes[::2]),
            KW=max(backward_taps(mode, width, w) for w in sizes[1::2]), BLOCK_X=block_x, BLOCK_D=block_d,
        )  # fmt: skip
    return out
