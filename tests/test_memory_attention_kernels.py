"""The Triton kernels: on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention import DTYPES, SHAPES, inputs, outputs, widened
from tests.chains import in_either_order
from tests.pairwise import types_in_turn
from vmemory.reference import memory_attention as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, poisoned, random_tensor

MODULE = "vmemory.kernels.memory_attention"


# one block and many, keys split between programs and not
@pytest.mark.parametrize(
    ("shape", "dtype"), types_in_turn([*SHAPES[:3], SHAPES[4], *SHAPES[6:], (1, 70, 1, 20, 2, 150)])
)
def test_triton_matches_reference(triton, shape, dtype):
    query, keys, values, count = inputs(*shape, dtype=dtype)
    out, stats = triton(MODULE, "memory_attention", query, keys, values, count, None, None, True)
    rounded = triton(MODULE, "memory_attention", query, keys, values, count, None, None, False)[0]
    assert out.dtype == torch.float32
    assert torch.equal(out.to(dtype), rounded)
    grad = random_tensor(*out.shape, seed=4).to(dtype)
    wide = outputs("reference", *widened(query, keys, values, count))
    low = in_either_order(lambda: outputs("reference", query, keys, values, count), wide)
    grads = triton(MODULE, "memory_attention_backward", grad, query, keys, values, count, None, None, out, stats, True)
    assert_within_budget([rounded, *grads], low, wide)
    alone = triton(MODULE, "memory_attention_backward", grad, query, keys, values, count, None, None, out, stats, False)
    assert torch.equal(alone[0], grads[0])
    assert [x.shape for x in alone[1:]] == [(0,), (0,)]


def sums(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("ne,mje->nmj", query[0, :, 0], keys[0, :, :, 0]).flatten(1) / 4
    most = scores.max(1).values
    return most, (scores - most[:, None]).exp().sum(1)


# with few programs the keys are split, and the largest score and the sum come from a combination
@pytest.mark.parametrize("queries", [17, 400])
def test_triton_saves_the_largest_score_and_the_sum(triton, queries):
    query, keys, values, count = inputs(1, queries, 1, 16, 3, 200)
    stats = triton(MODULE, "memory_attention", query, keys, values, count, None, None, False)[1]
    assert_within_budget(tuple(stats[:, 0, 0]), sums(query, keys), sums(query.double(), keys.double()))


def test_triton_weighs_minus_infinity_with_nothing(triton):
    query, keys, values, count = inputs(1, 3, 1, 4, 2, 200)
    query.abs_()
    keys[0, 0] = -float("inf")
    alone = query, keys[:, 1:], values[:, 1:], count
    out = triton(MODULE, "memory_attention", query, keys, values, count, None, None, False)[0]
    assert_within_budget(out, reference.memory_attention(*alone), reference.memory_attention(*widened(*alone)))


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["fwd", "fwd-wide", "share", "combine", "combine-wide", "delta", "slots", "query"])
@pytest.mark.parametrize(("dtype", "channels"), [("bf16", 64), ("bf16", 256), ("fp32", 64), ("fp32", 128)])
def test_triton_compiles(kernel, dtype, channels, arch):
    from vmemory.kernels import memory_attention as kernels

    signature = dict.fromkeys(("N", "M", "ROWS", "S", "G", "SPLITS"), "i32")
    signature |= dict.fromkeys(("query", "keys", "values", "grad", "out", "to_query"), f"*{dtype}")
    signature |= dict.fromkeys(("stats", "delta", "partial", "partial_stats"), "*fp32")
    signature |= {
        "key_scale": "*fp32",
        "value_scale": "*fp32",
        "count": "*i64",
        "SCALE": "fp32",
        "to_keys": f"*{dtype}",
        "to_values": f"*{dtype}",
    }
    walked = {"slots": "BLOCK_N", "query": "BLOCK_M"}.get(kernel, "")
    config = kernels.blocks(channels, dtype == "fp32", walked)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    constants = {"E": channels, **config}
    if kernel in ("fwd", "fwd-wide", "share", "query"):
        constants["QUANTIZED"] = False
    jitted = getattr(kernels, f"_memory_attention_{kernel.removesuffix('-wide')}_kernel", None)
    if kernel not in ("fwd", "combine"):
        signature["out"] = "*fp32"
    if kernel in ("fwd", "fwd-wide", "share"):
        jitted, constants["WHOLE"] = kernels._memory_attention_fwd_kernel, kernel != "share"
    elif kernel in ("slots", "query"):
        jitted = getattr(kernels, f"_memory_attention_{kernel}_bwd_kernel")
    else:
        constants["BLOCK_N"], options = 16, {}
        del constants["BLOCK_M"]
    compiled = compile_triton(jitted, signature, constants, arch, **options)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 196, 7, 128, 40, 196)])
def test_cuda_matches_reference(shape, dtype):
    x = tuple(v.cuda() for v in inputs(*shape, dtype=dtype))
    with poisoned():
        actual = outputs("triton", *x)
    assert_within_budget(actual, outputs("reference", *x), outputs("reference", *widened(*x)))
