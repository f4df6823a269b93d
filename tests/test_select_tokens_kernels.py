"""The selection's kernels for CUDA devices: on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.pairwise import types_in_turn
from tests.selection import DTYPES, clip, gradients, scores_with_ties
from vmemory.ops import compact, select_tokens
from vmemory.reference import select_tokens as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, poisoned, random_tensor

MODULE = "vmemory.kernels.select_tokens"


@pytest.mark.parametrize(
    ("tokens", "budget", "dtype"),
    [(*case, dtype) for case, dtype in types_in_turn([(63, 17), (1000, 300), (5000, 4100), (40, 40), (7, 0), (0, 0)])],
)
def test_triton_selects(triton, tokens, budget, dtype):
    for scores in (scores_with_ties(2, tokens, dtype=dtype), random_tensor(2, tokens, dtype=dtype)):
        indices, count = triton(MODULE, "select_tokens", scores, [budget], None)
        expected = reference.select_tokens(scores, [budget])
        assert torch.equal(indices, expected[0])
        assert torch.equal(count, expected[1])


@pytest.mark.parametrize(("budgets", "dtype"), types_in_turn([[5, 0, 400], [30, 30], [], [1000]]))
def test_triton_selects_by_segment(triton, budgets, dtype):
    scores = scores_with_ties(2, 700, dtype=dtype)
    segments = torch.randint(-1, len(budgets) + 1, (2, 700), generator=torch.Generator().manual_seed(1))
    for ids in (segments, segments[0]):
        indices, count = triton(MODULE, "select_tokens", scores, budgets, ids)
        expected = reference.select_tokens(scores, budgets, ids)
        assert torch.equal(indices, expected[0])
        assert torch.equal(count, expected[1])


@pytest.mark.parametrize(
    ("length", "kept", "dtype"), [(*case, dtype) for case, dtype in types_in_turn([(63, 21), (3, 40), (0, 4), (9, 0)])]
)
def test_triton_compacts(triton, length, kept, dtype):
    tokens, keep, *companions = clip(dtype, length, kept)
    rows = [tokens, *companions, companions[0].to(torch.int8)]
    for actual, expected in zip(triton(MODULE, "compact", rows, keep), reference.compact(rows, keep), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    grad, grads = random_tensor(2, kept, 5, 7, dtype=dtype, seed=6), []
    for x in (tokens.clone().requires_grad_(), tokens.double().requires_grad_()):
        (out,) = reference.compact([x], keep)
        grads += torch.autograd.grad(out, x, grad.to(out.dtype))
    assert_within_budget(triton(MODULE, "compact_backward", grad, keep, length), *grads)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["cut", "cut-segments", "emit", "emit-segments", "move", "move-times", "back"])
def test_triton_compiles(name, arch):
    from vmemory.kernels import select_tokens as kernels

    scan = {"scores": "*bf16", "segments": "*i64", "cuts": "*i64", "N": "i32", "G": "i32", "SEGMENT_STEP": "i32"}
    cut, emit = scan | {"budgets": "*i64"}, scan | {"indices": "*i64", "count": "*i64", "TOTAL": "i32"}
    move = {"x": "*bf16", "keep": "*i64", "out": "*bf16", "N": "i32", "K": "i32", "D": "i32"}
    back = move | {"grad": "*bf16", "places": "*i64", "first": "*i64"}
    wide, tile = {"BITS": 32, "BLOCK": 4096}, {"FILL": 0, "BLOCK_K": 2, "BLOCK_D": 1024}
    kernel, signature, constants, warps = {
        "cut": (kernels._select_cut_kernel, cut, {"BITS": 16, "BLOCK": 4096, "SEGMENTED": False}, 8),
        "cut-segments": (kernels._select_cut_kernel, cut | {"scores": "*fp32"}, wide | {"SEGMENTED": True}, 8),
        "emit": (kernels._select_emit_kernel, emit, {"BITS": 16, "BLOCK": 4096, "SEGMENTED": False}, 8),
        "emit-segments": (kernels._select_emit_kernel, emit | {"scores": "*fp32"}, wide | {"SEGMENTED": True}, 8),
        "move": (kernels._compact_kernel, move, tile, 4),
        "move-times": (
            kernels._compact_kernel, move | {"x": "*fp64", "out": "*fp64"},
            {"FILL": -1, "BLOCK_K": 2048, "BLOCK_D": 1}, 4,
        ),
        "back": (kernels._compact_bwd_kernel, back, {"BLOCK_N": 2, "BLOCK_D": 1024}, 4),
    }[name]  # fmt: skip
    compiled = compile_triton(kernel, signature, constants, arch, num_warps=warps)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("tokens", "budget"), [(63, 17), (1000, 1000), (24_209, 7263), (300_001, 3), (9, 0), (0, 0)])
def test_cuda_selects_as_reference(tokens, budget, dtype, impl):
    for x in (scores_with_ties(3, tokens, dtype=dtype).cuda(), random_tensor(3, tokens, dtype=dtype, device="cuda")):
        with poisoned():
            actual = select_tokens(x, budget, impl=impl)
        assert torch.equal(actual, reference.select_tokens(x, [budget])[0])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
# 646: the counts take shared memory to the last bytes that a device grants unasked
@pytest.mark.parametrize("segments", [1, 3, 300, 646, 900])
def test_cuda_selects_by_segment(segments, impl):
    x = scores_with_ties(2, 20_000).cuda()
    ids = torch.randint(-1, segments + 1, (2, 20_000), generator=torch.Generator().manual_seed(1)).cuda()
    for budgets in ([7] * segments, list(range(segments))):
        with poisoned():
            actual = select_tokens(x, budgets, ids, impl=impl)
        indices, count = reference.select_tokens(x, budgets, ids)
        assert torch.equal(actual.indices, indices)
        assert torch.equal(actual.count, count)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_cuda_compacts(dtype):
    tokens, keep, positions, times, flags = (x.cuda() for x in clip(dtype, 1000, 700))
    moved, others = compact(tokens, keep, positions, times, flags, impl="triton")
    expected = reference.compact([tokens, positions, times, flags], keep)
    for actual, wanted in zip((moved, *others), expected, strict=True):
        assert torch.equal(actual, wanted)
    grads = gradients("reference", tokens, keep, times), gradients("reference", tokens.double(), keep, times)
    assert_within_budget(gradients("triton", tokens, keep, times), *grads)
