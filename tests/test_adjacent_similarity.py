from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import types_in_turn
from vmemory.ops import adjacent_similarity, grid_pool
from vmemory.reference import adjacent_similarity as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEVELS = ("frame", "token")
MODULE = "vmemory.kernels.adjacent_similarity"
SHAPES = [
    (2, 5, 9, 33),
    # many frames: few similarities, all near zero, may be right to the last bit in the reference by chance
    (1, 40, 64, 1152),
    (1, 300, 2, 1152),
    (3, 2, 1, 7),
    (1, 70, 729, 8),
    (1, 1, 3, 4),
    (1, 0, 3, 4),
    (0, 3, 2, 4),
    (2, 3, 4, 0),
]


def gradient(impl: str, x: Tensor, level: str) -> Tensor:
    x = x.clone().requires_grad_()
    out = adjacent_similarity(x, level, impl=impl)
    return torch.autograd.grad(out, x, random_tensor(*out.shape, seed=3).to(x.device, out.dtype))[0]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype, level):
    x = random_tensor(*shape, dtype=dtype)
    with poisoned():
        actual, grad = adjacent_similarity(x, level), gradient("native", x, level)
    low, wide = reference.adjacent_similarity(x, level), reference.adjacent_similarity(x.double(), level)
    assert_within_budget(actual, low, wide)
    assert_within_budget(grad, gradient("reference", x, level), gradient("reference", x.double(), level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_gives_the_same_bits(layout, level):
    x = random_tensor(2, 4, 5, 70)
    assert torch.equal(adjacent_similarity(layouts(x)[layout], level), adjacent_similarity(x, level))


@pytest.mark.parametrize("level", LEVELS)
def test_identical_rows_score_alike_wherever_they_lie(level):
    a, b = random_tensor(1, 1, 70, 1153, seed=1), random_tensor(1, 1, 70, 1153, seed=2)
    scores = adjacent_similarity(torch.cat([a, b] * 40, 1).repeat(2, 1, 1, 1), level)
    assert (scores == scores[:1, :1]).all()


def test_frame_level_uses_the_mean_of_grid_pool():
    x = random_tensor(1, 2, 49, 130)
    mean, norm = grid_pool(x.unflatten(2, (7, 7)), 1, stats=True)[1:]
    stored = torch.ops.vmemory.adjacent_similarity(x, "frame")
    assert torch.equal(stored[1][..., 0], norm)
    assert torch.equal(stored[2][:, :, 0], mean)


@pytest.mark.parametrize("level", LEVELS)
def test_zero_frames_score_zero_and_pass_finite_gradients(level):
    x = random_tensor(1, 4, 3, 8)
    x[:, 1] = 0
    x.requires_grad_()
    scores = adjacent_similarity(x, level)
    assert (scores[:, :2] == 0).all()
    expected = reference.adjacent_similarity(x, level)
    (grad,), (wanted,) = (torch.autograd.grad(out.sum(), x) for out in (scores, expected))
    assert_within_budget(grad, wanted, gradient_of_sum(x.detach().double(), level))


def gradient_of_sum(x: Tensor, level: str) -> Tensor:
    x.requires_grad_()
    return torch.autograd.grad(reference.adjacent_similarity(x, level).sum(), x)[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_frames_touch_their_two_pairs_only(level, value):
    x = random_tensor(1, 6, 2, 40)
    x[0, 2, 1, 3] = value
    scores = adjacent_similarity(x, level).reshape(5, -1)[:, -1]
    assert torch.isnan(scores).tolist() == [False, True, True, False, False]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(level):
    x = random_tensor(2, 4, 3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: adjacent_similarity(x, level), x)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("level", LEVELS)
def test_opcheck(level):
    x = random_tensor(2, 4, 3, 20)
    torch.library.opcheck(torch.ops.vmemory.adjacent_similarity.default, (x, level))
    similarity, norm, _ = torch.ops.vmemory.adjacent_similarity(x, "token")
    arguments = torch.ones_like(similarity), x, similarity, norm
    torch.library.opcheck(torch.ops.vmemory.adjacent_similarity_backward.default, arguments)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic, level):
    torch._dynamo.reset()
    compiled = torch.compile(adjacent_similarity, fullgraph=True, backend=backend, dynamic=dynamic)
    for steps in (3, 5):
        x = random_tensor(2, steps, 4, 20)
        assert torch.equal(compiled(x, level), adjacent_similarity(x, level))
        variable, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(variable, level).square().sum().backward()
        adjacent_similarity(expected, level).square().sum().backward()
        # the compiler may multiply by the reciprocal of N where eager divides
        wide = x.double().requires_grad_()
        reference.adjacent_similarity(wide, level).square().sum().backward()
        assert_within_budget(variable.grad, expected.grad, wide.grad)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 9), st.integers(0, 40)),
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, level, dtype, layout):
    x = layouts(random_tensor(*shape, dtype=dtype, seed=sum(shape)))[layout]
    with poisoned():
        actual = adjacent_similarity(x, level)
    low, wide = reference.adjacent_similarity(x, level), reference.adjacent_similarity(x.double(), level)
    assert_within_budget(actual, low, wide)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: adjacent_similarity(3), TypeError, "frames: expected a tensor"),
        (lambda: adjacent_similarity(torch.ones(2, 3, 4)), ValueError, r"frames: expected a tensor \[S, T, N, D\]"),
        (lambda: adjacent_similarity(torch.ones(1, 2, 0, 4)), ValueError, "at least 1 token"),
        (lambda: adjacent_similarity(torch.ones(1, 2, 3, 4, dtype=torch.int32)), ValueError, "frames: .*int32"),
        (lambda: adjacent_similarity(torch.ones(1, 2, 3, 4), "pixel"), ValueError, "level: expected one of"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("shape", "dtype"), types_in_turn([(2, 3, 2, 33), (1, 1, 3, 4), (1, 0, 3, 4), (0, 3, 2, 4)]))
def test_triton_matches_reference(triton, shape, dtype, level):
    x = random_tensor(*shape, dtype=dtype)
    similarity, norm, mean = triton(MODULE, "adjacent_similarity", x, level)
    low, wide = reference.adjacent_similarity(x, level), reference.adjacent_similarity(x.double(), level)
    assert_within_budget(similarity.squeeze(2) if level == "frame" else similarity, low, wide)
    compared = mean if level == "frame" else x
    grad, grads = random_tensor(*similarity.shape, seed=4), []
    for variable in (compared.clone().requires_grad_(), compared.double().requires_grad_()):
        out = reference.adjacent_similarity(variable, "token")
        grads += torch.autograd.grad(out, variable, grad.to(out.dtype))
    assert_within_budget(triton(MODULE, "adjacent_similarity_backward", grad, compared, similarity, norm), *grads)


@pytest.mark.parametrize("piece", [2, 3, 8])
def test_triton_walks_long_clips_in_pieces(triton, piece):
    x = random_tensor(1, 6, 2, 20)
    similarity, norm = triton(MODULE, "compare", x, piece)
    low, wide = reference.adjacent_similarity(x, "token"), reference.adjacent_similarity(x.double(), "token")
    assert_within_budget(similarity, low, wide)
    assert_within_budget(norm, x.norm(dim=-1), x.double().norm(dim=-1))


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["mean", "fwd", "fwd-wide", "bwd"])
def test_triton_compiles(name, arch):
    from vmemory.kernels import adjacent_similarity as kernels

    frames = {"x": "*bf16", "T": "i32", "N": "i32", "D": "i32"}
    pairs = frames | {"similarity": "*fp32", "norm": "*fp32"}
    walk = {"PIECE": 16, "WHOLE": True, "BLOCK_D": 8192}
    kernel, signature, constants = {
        "mean": (kernels._frame_mean_kernel, frames | {"mean": "*fp32"}, {"BLOCK_N": 16, "BLOCK_D": 128}),
        "fwd": (kernels._adjacent_similarity_fwd_kernel, pairs, walk),
        "fwd-wide": (kernels._adjacent_similarity_fwd_kernel, pairs, walk | {"WHOLE": False, "BLOCK_D": 2048}),
        "bwd": (kernels._adjacent_similarity_bwd_kernel, pairs | {"grad": "*fp32", "out": "*bf16"}, {"BLOCK_D": 1024}),
    }[name]
    compiled = compile_triton(kernel, signature, constants, arch, num_warps=8 if constants["BLOCK_D"] > 2048 else 4)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 2, 9000)])
def test_cuda_matches_reference(shape, dtype, level):
    x = random_tensor(*shape, dtype=dtype, device="cuda")
    with poisoned():
        actual, grad = adjacent_similarity(x, level, impl="triton"), gradient("triton", x, level)
    low, wide = reference.adjacent_similarity(x, level), reference.adjacent_similarity(x.double(), level)
    assert_within_budget(actual, low, wide)
    assert_within_budget(grad, gradient("reference", x, level), gradient("reference", x.double(), level))
