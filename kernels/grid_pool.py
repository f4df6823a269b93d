"""Pool token grids with channels last.

Every kernel iterates over the taps k = 0, 1, .. of both axes, up to a bound for all cells, and masks the taps that a
cell does not have. Area windows are [floor(i n / m), ceil((i + 1) n / m)); bilinear has two taps per axis. The windows
that contain an input cell follow from the same formula with n and m swapped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import channel_block, device_of, jit, power_of_two


@jit
def bilinear_tap(i, k, n, m):
    """Return the source cell of tap k and its weight, in integers, so that a tap on a cell gives its neighbour 0."""
    at = tl.maximum((2 * i + 1) * n - m, 0)
    low = tl.minimum(at // (2 * m), n - 1)
    over = tl.where(low < n - 1, (at - low * 2 * m).to(tl.float32) / (2.0 * m), 0.0)
    return tl.minimum(low + k, n - 1), over * k + (1.0 - over) * (1 - k)


@jit
def forward_tap(i, k, n, m, AREA: tl.constexpr):
    """Return source cell k of output cell i, its weight (area: 1) and whether it exists."""
    if AREA:
        source = i * n // m + k
        return source, source * 0.0 + 1.0, source < ((i + 1) * n + m - 1) // m
    else:
        source, weight = bilinear_tap(i, k, n, m)
        return source, weight, weight > 0


@jit
def backward_tap(y, k, n, m, AREA: tl.constexpr):
    """Return the k-th output cell that may contain input cell y, its weight and whether it does."""
    if AREA:
        target = y * m // n + k
        size = ((target + 1) * n + m - 1) // m - target * n // m
        return target, 1.0 / size.to(tl.float32), target < ((y + 1) * m + n - 1) // n
    else:
        target = tl.maximum((2 * y - 1) * m // (2 * n) - 1, 0) + k
        low, low_weight = bilinear_tap(target, 0, n, m)
        high, high_weight = bilinear_tap(target, 1, n, m)
        weight = tl.where(low == y, low_weight, 0.0) + tl.where(high == y, high_weight, 0.0)
        return target, weight, (target < m) & (weight > 0)


@jit
def pool_tile(
    x, y, cells, d, H, W, h, w, D, AREA: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute output cells `cells` of output row y of the frame at x, channels d."""
    total = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for ky in range(KH):
        sy, wy, in_y = forward_tap(y, ky, H, h, AREA)
        live = (cells < w)[:, None] & (d < tl.where(in_y, D, 0))[None, :]
        row = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
        for kx in tl.range(KW, loop_unroll_factor=2):
            sx, wx, in_x = forward_tap(cells, kx, W, w, AREA)
            value = tl.load(x + (sy * W + sx)[:, None] * D + d[None, :], live & in_x[:, None], other=0.0).to(tl.float32)
            row += value * wx[:, None]
        total += row * wy
    if AREA:
        rows = ((y + 1) * H + h - 1) // h - y * H // h
        columns = ((cells + 1) * W + w - 1) // w - cells * W // w
        total = tl.div_rn(total, tl.broadcast_to((rows * columns).to(tl.float32)[:, None], total.shape))
    return total


@jit
def _grid_pool_fwd_kernel(
    x, out, H, W, h, w, D, AREA: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cells = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    frame = x + (row // h) * H * W * D
    tile = pool_tile(frame, row % h, cells, d, H, W, h, w, D, AREA, KH, KW, BLOCK_J, BLOCK_D)
    mask = (cells < w)[:, None] & (d < D)[None, :]
    tl.store(out + (row * w + cells)[:, None] * D + d[None, :], tile.to(out.dtype.element_ty), mask)


@jit
def _grid_pool_bwd_kernel(
    grad, cell, out, H, W, h, w, D, AREA: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CELL: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    frame, y = row // H, row % H
    total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    for ky in range(KH):
        i, wy, in_y = backward_tap(y, ky, H, h, AREA)
        live = (columns < W)[:, None] & (d < tl.where(in_y, D, 0))[None, :]
        for kx in range(KW):
            j, wx, in_x = backward_tap(columns, kx, W, w, AREA)
            source = grad + ((frame * h + i) * w + j)[:, None] * D + d[None, :]
            value = tl.load(source, live & in_x[:, None], other=0.0).to(tl.float32)
            total += value * (wy * wx)[:, None]
    if CELL:
        total += tl.load(cell + frame * D + d, d < D, other=0.0)[None, :]
    mask = (columns < W)[:, None] & (d < D)[None, :]
    tl.store(out + (row * W + columns)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask)


@jit
def _grid_pool_stats_kernel(
    x, out, mean, H, W, h, w, D, POOL: tl.constexpr, AREA: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += frame * H * W * D
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, H * W, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < H * W)[:, None] & (d < D)[None, :]
        total += tl.load(x + n[:, None] * D + d[None, :], mask, other=0.0).to(tl.float32)
    tl.store(mean + frame * D + d, tl.div_rn(tl.sum(total, 0), tl.zeros((BLOCK_D,), tl.float32) + H * W), d < D)
    if POOL:
        # the frame's slice of channels was just read, so this second read hits the caches
        for tile_index in range(0, h * tl.cdiv(w, BLOCK_J)):
            i = (tile_index // tl.cdiv(w, BLOCK_J)).to(tl.int64)
            cells = (tile_index % tl.cdiv(w, BLOCK_J)).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
            tile = pool_tile(x, i, cells, d, H, W, h, w, D, AREA, KH, KW, BLOCK_J, BLOCK_D)
            mask = (cells < w)[:, None] & (d < D)[None, :]
            to = out + ((frame * h + i) * w + cells)[:, None] * D + d[None, :]
            tl.store(to, tile.to(out.dtype.element_ty), mask)


@jit
def _norm_kernel(mean, norm, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        value = tl.load(mean + row * D + d, d < D, other=0.0)
        total += value * value
    tl.store(norm + row, tl.sqrt_rn(tl.sum(total, 0)))


@jit
def _pixel_shuffle_kernel(
    x, cell, out, H, W, D, TRANSPOSED: tl.constexpr, INVERSE: tl.constexpr, CELL: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    frame, y = row // H, row % H
    mask = (columns < W)[:, None] & (d < D)[None, :]
    plain = (row * W + columns)[:, None] * D + d[None, :]
    block = (columns // 2) * (H // 2) + y // 2 if TRANSPOSED else (y // 2) * (W // 2) + columns // 2
    shuffled = (frame * H * W + block * 4 + 2 * (y % 2) + columns % 2)[:, None] * D + d[None, :]
    if INVERSE:
        value = tl.load(x + shuffled, mask)
        if CELL:
            value = value.to(tl.float32) + tl.load(cell + frame * D + d, d < D, other=0.0)[None, :]
        tl.store(out + plain, value.to(out.dtype.element_ty), mask)
    else:
        tl.store(out + shuffled, tl.load(x + plain, mask), mask)


def forward_taps(mode: str, n: int, m: int) -> int:
    """Return the largest number of source cells of an output cell along an axis."""
    if mode == "bilinear":
        return 2
    return n // m if n % m == 0 else min(n, -(-n // m) + 1)


def backward_taps(mode: str, n: int, m: int) -> int:
    """Return an upper bound of the output cells that contain one input cell along an axis."""
    return -(-2 * m // n) + 3 if mode == "bilinear" else forward_taps("area", m, n)


def _shuffle(x: Tensor, cell: Tensor | None, out: Tensor, grid: list[int], mode: str, inverse: bool) -> None:
    (height, width), channels = grid, out.shape[3] if inverse else x.shape[3]
    block_x, block_d = min(8, power_of_two(width)), channel_block(channels, 256)
    launch = (out.shape[0] * height, triton.cdiv(width, block_x), triton.cdiv(channels, block_d))
    _pixel_shuffle_kernel[launch](
        x, x if cell is None else cell, out, height, width, channels, TRANSPOSED=mode == "pixel_shuffle_v1",
        INVERSE=inverse, CELL=cell is not None, BLOCK_X=block_x, BLOCK_D=block_d,
    )  # fmt: skip


def grid_pool(tokens: Tensor, size: list[int], mode: str) -> Tensor:
    x = tokens.contiguous()
    (frames, height, width, channels), (h, w) = x.shape, size
    shuffled = mode.startswith("pixel")
    out = x.new_empty((frames, h, w, channels * 4 if shuffled else channels))
    if out.numel() == 0:
        return out
    with device_of(x):
        if shuffled:
            _shuffle(x, None, out, [height, width], mode, False)
            return out
        block_j, block_d = min(4, power_of_two(w)), channel_block(channels, 256)
        _grid_pool_fwd_kernel[(frames * h, triton.cdiv(w, block_j), triton.cdiv(channels, block_d))](
            x, out, height, width, h, w, channels, AREA=mode == "area",
            KH=forward_taps(mode, height, h), KW=forward_taps(mode, width, w), BLOCK_J=block_j, BLOCK_D=block_d,
        )  # fmt: skip
    return out


def grid_pool_stats(tokens: Tensor, size: list[int], mode: str) -> tuple[Tensor, Tensor, Tensor]:
    x = tokens.contiguous()
    (frames, height, width, channels), (h, w) = x.shape, size
    shuffled = mode.startswith("pixel")
    out = grid_pool(x, size, mode) if shuffled else x.new_empty((frames, h, w, channels))
    mean = x.new_empty((frames, channels), dtype=torch.float32)
    norm = x.new_zeros((frames,), dtype=torch.float32)
    if x.numel() == 0:
        return out, mean, norm
    with device_of(x):
        # with few frames narrow blocks are needed to fill the device
        block_j, block_d = min(8, power_of_two(w)), channel_block(channels, 128 if frames >= 64 else 32)
        _grid_pool_stats_kernel[(frames, triton.cdiv(channels, block_d))](
            x, out, mean, height, width, h, w, channels, POOL=not shuffled, AREA=mode == "area",
            KH=1 if shuffled else forward_taps(mode, height, h), KW=1 if shuffled else forward_taps(mode, width, w),
            BLOCK_J=block_j, BLOCK_N=16, BLOCK_D=block_d,
        )  # fmt: skip
        _norm_kernel[(frames,)](mean, norm, channels, BLOCK_D=channel_block(channels, 1024))
    return out, mean, norm


def grid_pool_backward(grad: Tensor, cell: Tensor | None, grid: list[int], mode: str) -> Tensor:
    g = grad.contiguous()
    frames, h, w, channels = g.shape
    shuffled = mode.startswith("pixel")
    channels = channels // 4 if shuffled else channels
    out = g.new_empty((frames, grid[0], grid[1], channels))
    bias = None if cell is None else cell.contiguous()
    if out.numel() == 0:
        return out
    with device_of(g):
        if shuffled:
            _shuffle(g, bias, out, grid, mode, True)
            return out
        (height, width), block_x, block_d = grid, min(4, power_of_two(grid[1])), channel_block(channels, 256)
        _grid_pool_bwd_kernel[(frames * height, triton.cdiv(width, block_x), triton.cdiv(channels, block_d))](
            g, g if bias is None else bias, out, height, width, h, w, channels,
            AREA=mode == "area", KH=backward_taps(mode, height, h), KW=backward_taps(mode, width, w),
            CELL=bias is not None, BLOCK_X=block_x, BLOCK_D=block_d,
        )  # fmt: skip
    return out
