"""Gated fusion as two matrix products with fused epilogues; the concatenation and the gate are never stored.

The first product reads the channels of both inputs in turn and writes the hidden activation. The second product reads
it and blends the inputs. The backward pass computes the gate again; products without a fused part use cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._launch import device_of, jit, power_of_two
from vmemory.kernels._math import exp


@jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + exp(-x))


@jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    else:
        return x * _sigmoid(x)


@jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * exp(-0.5 * x * x)
    else:
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))


@jit
def _tile(n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first row and column of a program; eight tiles of rows in turn use the same cached weights."""
    GROUP: tl.constexpr = 8
    program, down, across = tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    rest = program % (GROUP * across)
    return (first + rest % height) * BLOCK_M, rest // height * BLOCK_N


@jit
def _add_product(
    total, x, weight, n, N, K, w_n, w_k, row, column,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return total + x [n, K] times weight [K, N]; rows and columns past the end repeat the last one."""
    k = tl.arange(0, BLOCK_K)
    r, c = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - row), tl.minimum(tl.arange(0, BLOCK_N), N - 1 - column)
    # 64-bit address for the tile, 32-bit offsets within it
    x += row.to(tl.int64) * K
    weight += column.to(tl.int64) * w_n
    at_x, at_w = r[:, None] * K + k[None, :], c[None, :] * w_n + k[:, None] * w_k
    for start in range(0, K, BLOCK_K):
        if EVEN:
            a, b = tl.load(x + at_x), tl.load(weight + at_w)
        else:
            a = tl.load(x + at_x, (start + k < K)[None, :], other=0.0)
            b = tl.load(weight + at_w, (start + k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x += BLOCK_K
        weight += tl.zeros((), tl.int64) + w_k * BLOCK_K
    return total


@jit
def _places(n, N, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile's start in a matrix [n, N], its offsets from there, which elements exist, and its columns."""
    r, c = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    start = row.to(tl.int64) * N
    return start, r[:, None] * N + c[None, :], (row + r < n)[:, None] & (c < N)[None, :], c


@jit
def _gated_fusion_hidden_kernel(
    working, episodic, w1, b1, hidden, argument, n, D, H, ACTIVATION: tl.constexpr, KEEP_ARGUMENT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = _tile(n, H, BLOCK_M, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = _add_product(z, working, w1, n, H, D, 2 * D, 1, row, column, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    z = _add_product(z, episodic, w1 + D, n, H, D, 2 * D, 1, row, column, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    start, at, inside, c = _places(n, H, row, column, BLOCK_M, BLOCK_N)
    z += tl.load(b1 + c, c < H, other=0.0).to(tl.float32)[None, :]
    if KEEP_ARGUMENT:
        tl.store(argument + start + at, z.to(argument.dtype.element_ty), inside)
    tl.store(hidden + start + at, _activate(z, ACTIVATION).to(hidden.dtype.element_ty), inside)


@jit
def _gated_fusion_fwd_kernel(
    hidden, w2, b2, working, episodic, out, n, D, H,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = _tile(n, D, BLOCK_M, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = _add_product(y, hidden, w2, n, D, H, H, 1, row, column, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    start, at, inside, c = _places(n, D, row, column, BLOCK_M, BLOCK_N)
    gate = _sigmoid(y + tl.load(b2 + c, c < D, other=0.0).to(tl.float32)[None, :])
    a = tl.load(working + start + at, inside, other=0.0).to(tl.float32)
    b = tl.load(episodic + start + at, inside, other=0.0).to(tl.float32)
    tl.store(out + start + at, (gate * a + (1.0 - gate) * b).to(out.dtype.element_ty), inside)


@jit
def _gated_fusion_bwd_gate_kernel(
    hidden, w2, b2, working, episodic, grad, gate_slope, grad_working, grad_episodic, n, D, H,
    WORKING: tl.constexpr, EPISODIC: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the gate, and the gradient of the tokens beside the gate."""
    row, column = _tile(n, D, BLOCK_M, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = _add_product(y, hidden, w2, n, D, H, H, 1, row, column, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    start, at, inside, c = _places(n, D, row, column, BLOCK_M, BLOCK_N)
    gate = _sigmoid(y + tl.load(b2 + c, c < D, other=0.0).to(tl.float32)[None, :])
    g = tl.load(grad + start + at, inside, other=0.0).to(tl.float32)
    to_working, to_episodic = g * gate, g * (1.0 - gate)
    if WORKING:
        tl.store(grad_working + start + at, to_working.to(grad_working.dtype.element_ty), inside)
    if EPISODIC:
        tl.store(grad_episodic + start + at, to_episodic.to(grad_episodic.dtype.element_ty), inside)
    a = tl.load(working + start + at, inside, other=0.0).to(tl.float32)
    b = tl.load(episodic + start + at, inside, other=0.0).to(tl.float32)
    tl.store(gate_slope + start + at, ((a - b) * (to_working * (1.0 - gate))).to(gate_slope.dtype.element_ty), inside)


@jit
def _gated_fusion_bwd_hidden_kernel(
    gate_slope, w2, argument, hidden_slope, n, D, H, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = _tile(n, H, BLOCK_M, BLOCK_N)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    g = _add_product(g, gate_slope, w2, n, H, D, 1, H, row, column, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    start, at, inside, _ = _places(n, H, row, column, BLOCK_M, BLOCK_N)
    z = tl.load(argument + start + at, inside, other=0.0).to(tl.float32)
    tl.store(hidden_slope + start + at, (g * _slope(z, ACTIVATION)).to(hidden_slope.dtype.element_ty), inside)


@jit
def _gated_fusion_activate_kernel(argument, hidden, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(argument + at, at < size, other=0.0).to(tl.float32)
    tl.store(hidden + at, _activate(z, ACTIVATION).to(hidden.dtype.element_ty), at < size)


def tiling(n: int, K: int, wide: bool, aligned: bool, narrow: bool = False) -> dict:
    """Return block sizes for n rows and sums of K terms; `wide` means float32, which tensor cores round.

    Rows that are not aligned cannot be copied ahead into shared memory, so their elements occupy registers. A long
    epilogue occupies registers too (`narrow`).
    """
    small = wide or narrow or not aligned
    rows = min(64 if small else 128, max(16, power_of_two(n)))
    columns = 64 if small else 128
    block_k = 64 if aligned and not wide else 32
    return {
        "EVEN": K % block_k == 0, "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": block_k,
        "num_warps": 8 if rows == 128 or narrow or not aligned else 4, "num_stages": 3,
    }  # fmt: skip


def _launch(kernel, n: int, N: int, K: int, *args, narrow: bool = False, **options) -> None:
    if n == 0 or N == 0:
        return
    aligned = K % 16 == 0 and N % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in args if isinstance(x, Tensor))
    options |= tiling(n, K, args[0].dtype == torch.float32, aligned, narrow)
    kernel[(triton.cdiv(n, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"]),)](*args, **options)


def gated_fusion(
    working: Tensor, episodic: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    working, episodic, w1, b1, w2, b2 = (x.contiguous() for x in (working, episodic, w1, b1, w2, b2))
    (n, D), H = working.shape, w1.shape[0]
    out, hidden = torch.empty_like(working), working.new_empty((n, H))
    keep = save and activation != "relu"
    argument = torch.empty_like(hidden) if keep else hidden
    with device_of(working):
        _launch(
            _gated_fusion_hidden_kernel, n, H, D, working, episodic, w1, b1, hidden, argument, n, D, H,
            ACTIVATION=activation, KEEP_ARGUMENT=keep,
        )  # fmt: skip
        _launch(_gated_fusion_fwd_kernel, n, D, H, hidden, w2, b2, working, episodic, out, n, D, H)
    return out, argument if save else working.new_empty((0,))


def gated_fusion_backward(
    grad: Tensor, working: Tensor, episodic: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, hidden: Tensor,
    activation: str, for_working: bool, for_episodic: bool, for_w1: bool, for_b1: bool, for_w2: bool, for_b2: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad, working, episodic, w2, b2 = (x.contiguous() for x in (grad, working, episodic, w2, b2))
    (n, D), H = working.shape, w1.shape[0]
    none = working.new_empty((0,))
    activated = hidden if activation == "relu" else torch.empty_like(hidden)
    gate_slope = torch.empty_like(working)
    grad_working = torch.empty_like(working) if for_working else none
    grad_episodic = torch.empty_like(working) if for_episodic else none
    hidden_slope = torch.empty_like(hidden) if for_working or for_episodic or for_w1 or for_b1 else none
    with device_of(working):
        if activation != "relu" and hidden.numel() > 0:
            size = hidden.numel()
            _gated_fusion_activate_kernel[(triton.cdiv(size, 1024),)](
                hidden, activated, size, ACTIVATION=activation, BLOCK=1024
            )
        _launch(
            _gated_fusion_bwd_gate_kernel, n, D, H, activated, w2, b2, working, episodic, grad, gate_slope,
            grad_working, grad_episodic, n, D, H, WORKING=for_working, EPISODIC=for_episodic,
        )  # fmt: skip
        if hidden_slope is not none:
            _launch(
                _gated_fusion_bwd_hidden_kernel, n, H, D, gate_slope, w2, hidden, hidden_slope, n, D, H,
                ACTIVATION=activation, narrow=activation != "relu",
            )  # fmt: skip
    if for_working:
        grad_working.addmm_(hidden_slope, w1[:, :D])
    if for_episodic:
        grad_episodic.addmm_(hidden_slope, w1[:, D:])
    grad_w1 = none
    if for_w1:
        grad_w1 = torch.cat([hidden_slope.mT @ working, hidden_slope.mT @ episodic], 1)
    return (
        grad_working,
        grad_episodic,
        grad_w1,
        hidden_slope.sum(0) if for_b1 else none,
        gate_slope.mT @ activated if for_w2 else none,
        gate_slope.sum(0) if for_b2 else none,
    )
