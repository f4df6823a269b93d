"""Pool, describe and merge the tokens of one frame, with the weights of `BankLayout.packed_maps`."""

from __future__ import annotations

import triton.language as tl

from vmemory.kernels._launch import jit


@jit
def nonzero_span(weight, stride, n: tl.constexpr, block: tl.constexpr):
    k = tl.arange(0, block).to(tl.int64)
    there = tl.load(weight + k * stride, k < n, other=0.0) != 0
    return tl.min(tl.where(there, k, n), 0), tl.max(tl.where(there, k + 1, 0), 0)


@jit
def pooled(
    source, mass, valid, rows, columns, i, j, d, n: tl.constexpr, m: tl.constexpr, D: tl.constexpr,
    block_n: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Return the weighted sum of the `n * m` source cells of output cell (i, j), channels d, and the sum of weights.

    `mass` and `valid` may be None. Cells of weight 0 are not read.
    """
    total, held = tl.zeros((block_d,), tl.float32), tl.zeros((), tl.float32)
    rows += i * n
    columns += j * m
    y0, y1 = nonzero_span(rows, 1, n, block_n)
    x0, x1 = nonzero_span(columns, 1, m, block_m)
    for y in range(y0, y1):
        for x in range(x0, x1):
            cell = y * m + x
            weight = tl.load(rows + y) * tl.load(columns + x)
            if mass is not None:
                weight *= tl.load(mass + cell)
            if valid is not None:
                weight = tl.where(tl.load(valid + cell) != 0, weight, 0.0)
            value = tl.load(source + cell * D + d, d < tl.where(weight != 0, D, 0), other=0.0).to(tl.float32)
            total += value * weight
            held += weight
    return total, held


@jit
def normalised(total, held):
    return tl.where(held == 0, 0.0, tl.where(held == 1, total, total / tl.where(held == 0, 1.0, held)))


@jit
def mean_weight(weights, at, there, n: tl.constexpr, m: tl.constexpr):
    total = tl.zeros(at.shape, tl.float32)
    for i in range(m):
        total += tl.load(weights + i * n + at, there, other=0.0)
    return total / m


@jit
def describe(
    frame, valid, table, out, d, source: tl.constexpr, g: tl.constexpr, block_c: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    """Write descriptors `[R, K]` of a frame that enters at tier `source`, channels d."""
    for r in tl.static_range(tl.constexpr(g.R)):
        if g.R == 1 or r >= source:
            total, weights = tl.zeros((block_d,), tl.float32), tl.zeros((), tl.float32)
            for start in range(0, g.H * g.W, block_c):
                cell = start + tl.arange(0, block_c)
                there = cell < g.H * g.W
                weight = there.to(tl.float32)
                if g.R > 1:
                    weight *= mean_weight(table + g.rows[source][r], cell // g.W, there, g.H, g.height[r])
                    weight *= mean_weight(table + g.columns[source][r], cell % g.W, there, g.W, g.width[r])
                if valid is not None:
                    weight = tl.where(tl.load(valid + cell, there, other=0) != 0, weight, 0.0)
                at = frame + cell.to(tl.int64)[:, None] * g.D + d[None, :]
                value = tl.load(at, (weight != 0)[:, None] & (d < g.K)[None, :], other=0.0).to(tl.float32)
                total += tl.sum(value * weight[:, None], 0)
                weights += tl.sum(weight, 0)
            tl.store(out + r * g.K + d, normalised(total, weights), d < g.K)
        else:
            tl.store(out + r * g.K + d, tl.zeros((block_d,), tl.float32), d < g.K)


@jit
def blend(x, y, share, n, block: tl.constexpr):
    for start in range(0, n, block):
        d = start + tl.arange(0, block)
        a, b = tl.load(x + d, d < n, other=0.0).to(tl.float32), tl.load(y + d, d < n, other=0.0).to(tl.float32)
        tl.store(x + d, (share * a + (1.0 - share) * b).to(x.dtype.element_ty), d < n)


@jit
def count_cells(valid, g: tl.constexpr, block: tl.constexpr):
    if valid is None:
        return tl.zeros((), tl.float64) + g.H * g.W
    else:
        total = tl.zeros((block,), tl.int32)
        for start in range(0, g.H * g.W, block):
            cell = start + tl.arange(0, block)
            total += (tl.load(valid + cell, cell < g.H * g.W, other=0) != 0).to(tl.int32)
        return tl.sum(total, 0).to(tl.float64)


@jit
def stream_of(streams, i, state_streams):
    """Return the stream of the state for row i, -1 = none."""
    at = i if streams is None else tl.load(streams + i)
    return tl.where(at < state_streams, at, -1)
