from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmemory.ops import grid_pool, grid_pool_ragged
from vmemory.reference import grid_pool_ragged as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.grid_pool_ragged"
SIZES = [(6, 7), (3, 3), (1, 1), (2, 9)]
MODES = ("area", "bilinear")


def gradient(impl: str, x: Tensor, mode: str) -> Tensor:
    x = x.clone().requires_grad_()
    out = grid_pool_ragged(x, SIZES, mode, impl=impl).tokens
    return torch.autograd.grad(out, x, random_tensor(*out.shape, seed=3).to(out.device, out.dtype))[0]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_native_matches_reference(dtype, mode):
    x = random_tensor(4, 6, 7, 50, dtype=dtype)
    with poisoned():
        actual, grad = grid_pool_ragged(x, SIZES, mode), gradient("native", x, mode)
    low, wide = reference.grid_pool_ragged(x, SIZES, mode), reference.grid_pool_ragged(x.double(), SIZES, mode)
    assert_within_budget(actual.tokens, low, wide)
    assert_within_budget(grad, gradient("reference", x, mode), gradient("reference", x.double(), mode))


@pytest.mark.parametrize("mode", MODES)
def test_each_frame_equals_grid_pool_to_the_bit(mode):
    x = random_tensor(4, 6, 7, 50)
    tokens, offsets = grid_pool_ragged(x, SIZES, mode)
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [0, 42, 51, 52, 70]
    for t, size in enumerate(SIZES):
        assert torch.equal(tokens[offsets[t] : offsets[t + 1]], grid_pool(x[t], size, mode).flatten(0, 1))


def test_no_frames():
    tokens, offsets = grid_pool_ragged(torch.empty(0, 4, 4, 8), [])
    assert tokens.shape == (0, 8)
    assert offsets.tolist() == [0]


@pytest.mark.parametrize("layout", ["strided", "reversed", "padded", "offset"])
def test_any_layout_gives_the_same_bits(layout):
    x = random_tensor(4, 6, 7, 20)
    assert torch.equal(grid_pool_ragged(layouts(x)[layout], SIZES).tokens, grid_pool_ragged(x, SIZES).tokens)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    x = random_tensor(2, 3, 4, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grid_pool_ragged(x, [2, (4, 3)], mode).tokens, x)


@pytest.mark.usefixtures("native")
def test_opcheck():
    x, grad = random_tensor(2, 4, 4, 20), random_tensor(5, 20)
    torch.library.opcheck(torch.ops.vmemory.grid_pool_ragged.default, (x, [2, 2, 1, 1], "area"))
    torch.library.opcheck(torch.ops.vmemory.grid_pool_ragged_backward.default, (grad, [2, 2, 1, 1], [4, 4], "area"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(grid_pool_ragged, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = random_tensor(4, 6, 7, 20)
    for a, b in zip(compiled(x, SIZES), grid_pool_ragged(x, SIZES), strict=True):
        assert torch.equal(a, b)


@given(
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=5),
    mode=st.sampled_from(MODES),
)
@settings(max_examples=40, deadline=None)
def test_any_sizes(grid, sizes, mode):
    x = random_tensor(len(sizes), *grid, 17, seed=len(sizes))
    with poisoned():
        actual = grid_pool_ragged(x, sizes, mode)
    low, wide = reference.grid_pool_ragged(x, sizes, mode), reference.grid_pool_ragged(x.double(), sizes, mode)
    assert_within_budget(actual.tokens, low, wide)
    assert actual.offsets[-1] == len(actual.tokens)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: grid_pool_ragged(torch.ones(4, 4, 8), [2]), ValueError, r"tokens: expected a tensor \[T, H, W, D\]"),
        (lambda: grid_pool_ragged(torch.ones(2, 4, 4, 8), [2]), ValueError, "sizes: expected one size per frame, 2"),
        (lambda: grid_pool_ragged(torch.ones(1, 4, 4, 8), [(2, 0)]), ValueError, r"sizes\[0\]: expected at least 1"),
        (lambda: grid_pool_ragged(torch.ones(1, 4, 4, 8), ["2"]), TypeError, r"sizes\[0\]"),
        (lambda: grid_pool_ragged(torch.ones(1, 4, 4, 8), [2], "pixel_shuffle_v1"), ValueError, "mode: expected"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_matches_reference(triton, dtype, mode):
    x, sizes = random_tensor(3, 4, 3, 18, dtype=dtype), [(4, 3), (1, 1), (2, 5)]
    flat = [side for size in sizes for side in size]
    low, wide = reference.grid_pool_ragged(x, sizes, mode), reference.grid_pool_ragged(x.double(), sizes, mode)
    assert_within_budget(triton(MODULE, "grid_pool_ragged", x, flat, mode), low, wide)
    grad, grads = random_tensor(*low.shape, seed=4).to(dtype), []
    for variable in (x.clone().requires_grad_(), x.double().requires_grad_()):
        out = reference.grid_pool_ragged(variable, sizes, mode)
        grads += torch.autograd.grad(out, variable, grad.to(out.dtype))
    assert_within_budget(triton(MODULE, "grid_pool_ragged_backward", grad, flat, [4, 3], mode), *grads)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("side", ["fwd", "bwd"])
def test_triton_compiles(side, arch):
    from vmemory.kernels import grid_pool_ragged as kernels

    shared = {"table": "*i64", "out": "*bf16", "H": "i32", "W": "i32", "D": "i32"}
    taps = {"AREA": True, "KH": 4, "KW": 4, "BLOCK_D": 256}
    if side == "fwd":
        kernel, first, constants = kernels._grid_pool_ragged_fwd_kernel, "x", taps | {"ROWS": 16, "BLOCK_J": 4}
    else:
        kernel, first, constants = kernels._grid_pool_ragged_bwd_kernel, "grad", taps | {"BLOCK_X": 4}
    compiled = compile_triton(kernel, shared | {first: "*bf16"}, constants, arch)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_matches_reference(dtype, mode):
    x = random_tensor(4, 6, 7, 50, dtype=dtype, device="cuda")
    with poisoned():
        actual, grad = grid_pool_ragged(x, SIZES, mode, impl="triton"), gradient("triton", x, mode)
    low, wide = reference.grid_pool_ragged(x, SIZES, mode), reference.grid_pool_ragged(x.double(), SIZES, mode)
    assert_within_budget(actual.tokens, low, wide)
    assert_within_budget(grad, gradient("reference", x, mode), gradient("reference", x.double(), mode))
