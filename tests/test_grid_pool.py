from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vmemory
from tests.pairwise import types_in_turn
from vmemory.ops import PooledGrid, grid_pool
from vmemory.reference import grid_pool as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.grid_pool"
# input shape, size, mode
CASES = [
    ((2, 16, 16, 1152), (8, 8), "area"),
    ((3, 7, 5, 19), (3, 4), "area"),
    ((2, 5, 6, 33), (9, 8), "area"),
    ((1, 27, 27, 200), (1, 1), "area"),
    ((7, 4, 4, 8), (4, 4), "area"),
    ((3, 7, 5, 19), (3, 4), "bilinear"),
    ((2, 5, 6, 33), (9, 8), "bilinear"),
    ((2, 3, 8, 8, 24), (4, 4), "bilinear"),
    ((1, 1, 1, 1), (1, 1), "bilinear"),
    ((2, 4, 6, 21), (2, 3), "pixel_shuffle_v2"),
    ((2, 4, 6, 21), (3, 2), "pixel_shuffle_v1"),
    ((8, 6, 40), (4, 3), "area"),
    ((0, 4, 4, 8), (2, 2), "area"),
    ((2, 4, 4, 0), (2, 2), "bilinear"),
    ((0, 4, 4, 8), (2, 2), "pixel_shuffle_v1"),
]
# small enough to be run on the CPU
SMALL = [
    ((2, 4, 4, 24), (2, 2), "area"),
    ((1, 5, 3, 19), (2, 4), "area"),
    ((1, 1, 5, 19), (1, 2), "area"),
    ((1, 3, 5, 17), (5, 2), "bilinear"),
    ((1, 4, 2, 21), (1, 2), "pixel_shuffle_v1"),
    ((1, 4, 2, 21), (2, 1), "pixel_shuffle_v2"),
    ((0, 4, 4, 8), (2, 2), "area"),
]


def run_reference(x: Tensor, size: tuple[int, int], mode: str) -> tuple[Tensor, ...]:
    return (reference.grid_pool(x, size, mode), *reference.frame_stats(x))


def gradient(impl: str, x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    x = x.clone().requires_grad_()
    outs = grid_pool(x, size, mode, stats=True, impl=impl)
    seeds = [random_tensor(*out.shape, seed=3 + i).to(out.device, out.dtype) for i, out in enumerate(outs)]
    return torch.autograd.grad(outs, x, seeds)[0]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("shape", "mode"),
    [((40, 16, 16, 832), "area"), ((2, 14, 14, 22_016), "bilinear"), ((40, 16, 16, 832), "pixel_shuffle_v1")],
)
def test_what_is_written_past_the_caches_is_the_same(shape, mode):
    # more than 32 MB of output, and 4 frames or some channels of it at a time, which is less
    x = random_tensor(*shape[:3], 64).repeat_interleave(shape[3] // 64, -1)
    size = (shape[1] // 2, shape[2] // 2) if mode == "pixel_shuffle_v1" else shape[1:3]
    whole = gradient("native", x, size, mode)
    pooled = grid_pool(x, size, mode)
    assert pooled.numel() * pooled.element_size() > 2**25
    for part in [slice(4 * i, 4 * i + 4) for i in range(10)] if len(x) > 4 else [slice(0, 1), slice(1, 2)]:
        assert torch.equal(grid_pool(x[part], size, mode), pooled[part])
    assert_within_budget(whole, gradient("reference", x, size, mode), gradient("reference", x.double(), size, mode))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("shape", "size", "mode"), CASES)
def test_native_matches_reference(shape, size, mode, dtype):
    x = random_tensor(*shape, dtype=dtype)
    with poisoned():
        pooled, stats = grid_pool(x, size, mode), grid_pool(x, size, mode, stats=True)
    assert torch.equal(pooled, stats.tokens)
    assert_within_budget(stats, run_reference(x, size, mode), run_reference(x.double(), size, mode))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("shape", "size", "mode"), CASES)
def test_native_gradient_matches_reference(shape, size, mode, dtype):
    x = random_tensor(*shape, dtype=dtype)
    with poisoned():
        actual = gradient("native", x, size, mode)
    low, wide = gradient("reference", x, size, mode), gradient("reference", x.double(), size, mode)
    assert_within_budget(actual, low, wide)


@pytest.mark.parametrize("layout", ["contiguous", "offset", "strided", "reversed", "padded"])
@pytest.mark.parametrize("mode", ["area", "bilinear", "pixel_shuffle_v2"])
def test_any_layout_gives_the_same_bits(layout, mode):
    x = random_tensor(2, 6, 4, 70)
    variant = layouts(x)[layout]
    for a, b in zip(grid_pool(variant, (3, 2), mode, stats=True), grid_pool(x, (3, 2), mode, stats=True), strict=True):
        assert torch.equal(a, b)


def test_layout_of_the_gradient_does_not_matter():
    x = random_tensor(2, 6, 4, 70).requires_grad_()
    grad = random_tensor(2, 3, 2, 70, seed=1)
    expected = torch.autograd.grad(grid_pool(x, (3, 2)), x, grad)[0]
    for name, variant in layouts(grad).items():
        assert torch.equal(torch.autograd.grad(grid_pool(x, (3, 2)), x, variant)[0], expected), name


def test_frame_mean_does_not_depend_on_pooling_or_neighbours():
    x = random_tensor(3, 9, 6, 130)
    mean = grid_pool(x, 1, stats=True).mean
    for size, mode in (((4, 5), "area"), ((3, 3), "bilinear"), ((9, 6), "area")):
        assert torch.equal(grid_pool(x, size, mode, stats=True).mean, mean)
    assert torch.equal(grid_pool(x[2], 2, stats=True).mean, mean[2])


def test_one_frame_split_over_threads_is_bit_identical():
    x = random_tensor(1, 20, 20, 1500)
    together = grid_pool(x, 4, stats=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = grid_pool(x, 4, stats=True)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["area", "bilinear"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_reach_what_they_are_part_of(mode, value):
    x = random_tensor(2, 6, 6, 20)
    x[0, 2, 3, 7] = value
    actual = grid_pool(x, 3, mode, stats=True)
    assert_within_budget(actual, run_reference(x, (3, 3), mode), run_reference(x.double(), (3, 3), mode))
    assert not torch.isfinite(actual.mean[0, 7])
    assert torch.isfinite(actual.tokens[1]).all()


# grids whose taps lie exactly on cells, and sides that stay what they are
EXACT = [((3, 3), (7, 7)), ((3, 5), (3, 5)), ((3, 5), (4, 5)), ((9, 3), (3, 1)), ((5, 6), (2, 9)), ((2, 1), (5, 4))]


def one_bad_cell_a_frame(grid: tuple[int, int], value: float, dtype: torch.dtype) -> torch.Tensor:
    cells = torch.arange(grid[0] * grid[1])
    x = random_tensor(len(cells), *grid, 3, dtype=dtype)
    x.flatten(1, 2)[cells, cells, 1] = value
    return x


def assert_lost_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("grid", "size"), EXACT)
def test_taps_of_weight_zero_are_not_read(grid, size, value):
    """Zero times infinity is no number: a tap exactly on a cell leaves its neighbour alone, whoever computes it."""
    for dtype in (torch.float32, torch.float64):
        x = one_bad_cell_a_frame(grid, value, dtype)
        assert_lost_alike(grid_pool(x, size, "bilinear"), grid_pool(x, size, "bilinear", impl="reference"))


@pytest.mark.parametrize(("grid", "size"), EXACT[:2])
def test_triton_reads_no_tap_of_weight_zero(triton, grid, size):
    x = one_bad_cell_a_frame(grid, float("inf"), torch.float32)[3:6]
    expected = grid_pool(x, size, "bilinear", impl="reference")
    assert_lost_alike(triton(MODULE, "grid_pool", x, list(size), "bilinear"), expected)


@pytest.mark.parametrize(("grid", "size"), EXACT)
def test_bilinear_reference_is_torchs(grid, size):
    x = random_tensor(2, *grid, 3, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x.movedim(-1, 1), size, mode="bilinear").movedim(1, -1)
    assert torch.allclose(grid_pool(x, size, "bilinear", impl="reference"), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("mode", ["area", "bilinear"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_pooling_to_the_same_grid_is_the_identity(mode, impl):
    x = random_tensor(2, 5, 7, 33, dtype=torch.bfloat16)
    x[0, 1, 2, 3], x[1, 4, 0, 1] = float("inf"), float("nan")
    # a NaN may come back with other bits
    torch.testing.assert_close(grid_pool(x, (5, 7), mode, impl=impl), x, rtol=0, atol=0, equal_nan=True)


def test_norm_of_a_zero_frame_has_gradient_zero():
    x = torch.zeros(1, 2, 2, 8, requires_grad=True)
    grid_pool(x, 1, stats=True).norm.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("mode", ["area", "bilinear", "pixel_shuffle_v1", "pixel_shuffle_v2"])
def test_gradcheck(mode):
    size = {"pixel_shuffle_v1": (3, 2), "pixel_shuffle_v2": (2, 3)}.get(mode, (3, 5))
    x = random_tensor(2, 4, 6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(grid_pool(x, size, mode, stats=True)), x)
    assert torch.autograd.gradcheck(lambda x: grid_pool(x, size, mode), x)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, grad, cell = random_tensor(2, 6, 5, 20, dtype=dtype), random_tensor(2, 3, 2, 20, dtype=dtype), torch.ones(2, 20)
    ops = torch.ops.vmemory
    torch.library.opcheck(ops.grid_pool.default, (x, [3, 2], "area"))
    torch.library.opcheck(ops.grid_pool_stats.default, (x, [3, 2], "bilinear"))
    torch.library.opcheck(ops.grid_pool_backward.default, (grad, None, [6, 5], "area"))
    torch.library.opcheck(ops.grid_pool_backward.default, (grad, cell, [6, 5], "bilinear"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(grid_pool, fullgraph=True, backend=backend, dynamic=dynamic)
    for frames in (2, 5):
        x = random_tensor(frames, 6, 8, 20)
        for a, b in zip(compiled(x, (3, 4), stats=True), grid_pool(x, (3, 4), stats=True), strict=True):
            assert torch.equal(a, b)
        variable = x.clone().requires_grad_()
        compiled(variable, (3, 4)).square().sum().backward()
        expected = x.clone().requires_grad_()
        grid_pool(expected, (3, 4)).square().sum().backward()
        assert torch.equal(variable.grad, expected.grad)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 40)),
    size=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    mode=st.sampled_from(["area", "bilinear"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, size, mode, dtype, layout):
    x = layouts(random_tensor(*shape, dtype=dtype, seed=sum(shape)))[layout]
    with poisoned():
        actual = grid_pool(x, size, mode, stats=True)
    assert_within_budget(actual, run_reference(x, size, mode), run_reference(x.double(), size, mode))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: grid_pool([1.0], 2), TypeError, "tokens: expected a tensor"),
        (lambda: grid_pool(torch.ones(4, 4), 2), ValueError, "tokens: expected a tensor"),
        (lambda: grid_pool(torch.ones(1, 4, 4, 8, dtype=torch.int64), 2), ValueError, "tokens: .*int64"),
        (lambda: grid_pool(torch.ones(1, 0, 4, 8), 2), ValueError, "at least 1 cell"),
        (lambda: grid_pool(torch.ones(1, 4, 4, 8), 0), ValueError, "size: expected at least 1, got 0"),
        (lambda: grid_pool(torch.ones(1, 4, 4, 8), 2.0), TypeError, "size: expected an int or a pair"),
        (lambda: grid_pool(torch.ones(1, 4, 4, 8), 2, "max"), ValueError, "mode: expected one of 'area'"),
        (lambda: grid_pool(torch.ones(1, 5, 4, 8), 2, "pixel_shuffle_v1"), ValueError, "even H and W"),
        (lambda: grid_pool(torch.ones(1, 4, 6, 8), (2, 3), "pixel_shuffle_v1"), ValueError, r"size: expected \(3, 2\)"),
        (lambda: grid_pool(torch.ones(1, 4, 4, 8), 2, impl="cuda"), ValueError, "impl: expected"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("shape", "size", "mode", "dtype"), [(*case, dtype) for case, dtype in types_in_turn(SMALL)])
def test_triton_matches_reference(triton, shape, size, mode, dtype):
    x = random_tensor(*shape, dtype=dtype)
    low, wide = run_reference(x, size, mode), run_reference(x.double(), size, mode)
    assert_within_budget(triton(MODULE, "grid_pool", x, list(size), mode), low[0], wide[0])
    assert_within_budget(triton(MODULE, "grid_pool_stats", x, list(size), mode), low, wide)


@pytest.mark.parametrize(("shape", "size", "mode", "dtype"), [(*case, dtype) for case, dtype in types_in_turn(SMALL)])
def test_triton_backward(triton, shape, size, mode, dtype):
    x, cell = random_tensor(*shape, dtype=dtype), random_tensor(shape[0], shape[3], seed=5)
    grad = random_tensor(*reference.grid_pool(x, size, mode).shape, seed=4).to(dtype)
    plain, biased = [], []
    for variable in (x.clone().requires_grad_(), x.double().requires_grad_()):
        outs = run_reference(variable, size, mode)[:2]
        # a gradient of the mean is the same for every cell
        seeds = grad.to(variable.dtype), (cell * (shape[1] * shape[2])).to(outs[1].dtype)
        plain += torch.autograd.grad(outs[0], variable, seeds[0], retain_graph=True)
        biased += torch.autograd.grad(outs, variable, seeds)
    assert_within_budget(triton(MODULE, "grid_pool_backward", grad, None, list(shape[1:3]), mode), *plain)
    assert_within_budget(triton(MODULE, "grid_pool_backward", grad, cell, list(shape[1:3]), mode), *biased)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["fwd-area", "fwd-bilinear", "bwd", "stats", "norm", "shuffle", "unshuffle"])
def test_triton_compiles(name, arch):
    from vmemory.kernels import grid_pool as kernels

    grid = dict.fromkeys(("H", "W", "h", "w", "D"), "i32")
    forward = {"x": "*bf16", "out": "*bf16", **grid}
    taps = {"AREA": True, "KH": 2, "KW": 2, "BLOCK_J": 4, "BLOCK_D": 256}
    shuffle = {"x": "*bf16", "cell": "*fp32", "out": "*bf16", "H": "i32", "W": "i32", "D": "i32"}
    moved = {"TRANSPOSED": True, "INVERSE": False, "CELL": False, "BLOCK_X": 8, "BLOCK_D": 256}
    kernel, signature, constants = {
        "fwd-area": (kernels._grid_pool_fwd_kernel, forward, taps),
        "fwd-bilinear": (kernels._grid_pool_fwd_kernel, forward, taps | {"AREA": False}),
        "bwd": (
            kernels._grid_pool_bwd_kernel,
            {"grad": "*bf16", "cell": "*fp32", "out": "*bf16", **grid},
            {"AREA": False, "KH": 4, "KW": 4, "CELL": True, "BLOCK_X": 4, "BLOCK_D": 256},
        ),
        "stats": (
            kernels._grid_pool_stats_kernel,
            forward | {"mean": "*fp32"},
            taps | {"POOL": True, "BLOCK_J": 8, "BLOCK_N": 16, "BLOCK_D": 128},
        ),
        "norm": (kernels._norm_kernel, {"mean": "*fp32", "norm": "*fp32", "D": "i32"}, {"BLOCK_D": 1024}),
        "shuffle": (kernels._pixel_shuffle_kernel, shuffle, moved),
        "unshuffle": (kernels._pixel_shuffle_kernel, shuffle, moved | {"INVERSE": True, "CELL": True}),
    }[name]
    compiled = compile_triton(kernel, signature, constants, arch)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size", "mode"), CASES)
def test_cuda_matches_reference(shape, size, mode, dtype, impl):
    x = random_tensor(*shape, dtype=dtype, device="cuda")
    with poisoned():
        actual, grad = grid_pool(x, size, mode, stats=True, impl=impl), gradient(impl, x, size, mode)
    assert_within_budget(actual, run_reference(x, size, mode), run_reference(x.double(), size, mode))
    expected = gradient("reference", x, size, mode), gradient("reference", x.double(), size, mode)
    assert_within_budget(grad, *expected)


def test_explain_names_every_implementation():
    said = vmemory.explain(grid_pool, torch.ones(1, 4, 4, 8), 2)
    assert {said.impl, *said.rejected} == {"native", "triton", "reference"}
    assert isinstance(grid_pool(torch.ones(1, 4, 4, 8), 2, stats=True), PooledGrid)
