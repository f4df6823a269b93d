from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.chains import in_either_order
from tests.pairwise import types_in_turn
from vmemory.ops import attention_column_sums
from vmemory.reference import attention_column_sums as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.attention_column_sums"
# S, N, G, E, M
SHAPES = [
    (1, 63, 2, 33, 70),
    (2, 130, 3, 64, 130),
    (1, 1, 2, 128, 300),
    (1, 300, 1, 8, 7),
    (2, 5, 2, 1, 1000),
    (1, 17, 2, 200, 65),
    (0, 3, 2, 8, 2),
    (2, 0, 2, 8, 3),
    (2, 3, 0, 8, 2),
    (2, 3, 2, 8, 0),
]
NAN, INF = float("nan"), float("inf")


def inputs(S: int, N: int, G: int, E: int, M: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random_tensor(S, N, G, E, dtype=dtype, seed=1), random_tensor(S, M, G, E, dtype=dtype, seed=2)


def weight_of(sums: Tensor) -> Tensor:
    return random_tensor(*sums.shape, seed=4).to(sums.device, sums.dtype)


def outputs(impl: str, query: Tensor, key: Tensor, causal: bool) -> list[Tensor]:
    """The sums a head and the gradients of the two."""
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    sums = attention_column_sums(*leaves, causal=causal, per_head=True, impl=impl)
    return [sums.detach(), *torch.autograd.grad(sums, leaves, weight_of(sums))]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype, causal):
    x = inputs(*shape, dtype=dtype)
    with poisoned():
        actual = outputs("native", *x, causal)
    assert_within_budget(
        actual, outputs("reference", *x, causal), outputs("reference", *(v.double() for v in x), causal)
    )
    assert torch.equal(attention_column_sums(*x, causal=causal, per_head=True), actual[0])
    assert torch.equal(attention_column_sums(*x, causal=causal), actual[0].sum(1))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_are_the_column_sums_of_the_softmax(causal, impl):
    query, key = inputs(2, 20, 3, 16, 20, dtype=torch.float64)
    scores = torch.einsum("snge,smge->sgnm", query, key) / 4
    if causal:
        scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -INF)
    wanted = scores.softmax(-1).sum(2)
    torch.testing.assert_close(attention_column_sums(query, key, causal=causal, per_head=True, impl=impl), wanted)
    torch.testing.assert_close(attention_column_sums(query, key, causal=causal, impl=impl).sum(), wanted.sum())


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_last_query_sees_every_key(impl):
    query, key = inputs(1, 4, 1, 8, 10)
    whole = attention_column_sums(query[:, -1:], key, impl=impl)
    assert torch.equal(attention_column_sums(query[:, -1:], key, causal=True, impl=impl), whole)
    # of more queries than keys the first see nothing and add nothing
    few = attention_column_sums(query, key[:, :2], causal=True, impl=impl)
    assert_within_budget(
        few, *(reference.attention_column_sums(*(x.to(t) for x in (query[:, 2:], key[:, :2])), True).sum(1)
               for t in (torch.float32, torch.float64))
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_values_spoil_what_they_reach(value, causal, impl):
    query, key = inputs(1, 200, 2, 8, 200)
    query[0, 150, 0, 3] = value
    sums = attention_column_sums(query, key, causal=causal, per_head=True, impl=impl)
    assert sums[0, 1].isfinite().all()
    seen = 151 if causal else 200
    assert sums[0, 0, :seen].isnan().all()
    assert sums[0, 0, seen:].isfinite().all()
    leaves = [x.requires_grad_() for x in (query, key)]
    sums = attention_column_sums(*leaves, causal=causal, per_head=True, impl=impl)
    to_query, to_key = torch.autograd.grad(sums, leaves, weight_of(sums))
    assert to_query[0, 150, 0].isnan().all()
    assert to_query[0, :150, 0].isfinite().all()
    assert to_key[0, :, 1].isfinite().all()
    # a weight of 0 times what is not finite
    assert to_key[0, seen:, 0, :3].isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_scores_of_minus_infinity_weigh_nothing(impl):
    query, key = inputs(1, 9, 1, 4, 300)
    query.abs_()
    key[0, 7] = -INF
    sums = attention_column_sums(query, key, impl=impl)
    assert sums[0, 7] == 0
    rest = torch.cat([key[:, :7], key[:, 8:]], 1)
    without = [reference.attention_column_sums(*(x.to(t) for x in (query, rest))).sum(1) for t in DTYPES[:1]]
    wide = reference.attention_column_sums(query.double(), rest.double()).sum(1)
    assert_within_budget(torch.cat([sums[:, :7], sums[:, 8:]], 1), *without, wide)


def test_large_scores_do_not_overflow():
    query, key = (x * 1e3 for x in inputs(1, 33, 2, 16, 70))
    wide = reference.attention_column_sums(query.double(), key.double())
    sums = attention_column_sums(query, key, per_head=True)
    assert_within_budget(sums, reference.attention_column_sums(query, key), wide)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_gives_the_same_bits(layout):
    x = inputs(2, 50, 3, 40, 70)
    turned = [layouts(v)[layout].requires_grad_() for v in x]
    sums = attention_column_sums(*turned, causal=True, per_head=True)
    grads = torch.autograd.grad(sums, turned, layouts(weight_of(sums))[layout])
    for got, wanted in zip((sums, *grads), outputs("native", *x, True), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("causal", [False, True])
def test_the_result_does_not_depend_on_the_threads(causal):
    x = inputs(1, 1000, 2, 64, 700)
    whole, threads = outputs("native", *x, causal), torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, outputs("native", *x, causal), whole))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    leaves = [x.requires_grad_() for x in inputs(2, 4, 2, 3, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attention_column_sums(*x, causal=causal), leaves)
    assert torch.autograd.gradcheck(lambda *x: attention_column_sums(*x, causal=causal, per_head=True), leaves[::-1])


@pytest.mark.parametrize("needing", [(True, False), (False, True)])
def test_gradients_for_some_inputs_only(needing):
    x = inputs(1, 20, 2, 16, 30)
    leaves = [v.clone().requires_grad_(need) for v, need in zip(x, needing, strict=True)]
    sums = attention_column_sums(*leaves, per_head=True)
    sums.backward(weight_of(sums))
    for leaf, need, wanted in zip(leaves, needing, outputs("auto", *x, False)[1:], strict=True):
        assert torch.equal(leaf.grad, wanted) if need else leaf.grad is None


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal):
    query, key = inputs(2, 20, 2, 16, 30, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.vmemory.attention_column_sums.default, (query, key, causal))
    sums, stats = torch.ops.vmemory.attention_column_sums(query, key, causal)
    torch.library.opcheck(torch.ops.vmemory.attention_column_sums_backward.default, (sums, query, key, stats, causal))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attention_column_sums, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (5, 9):
        x = inputs(2, tokens, 2, 16, tokens + 3)
        leaves = [v.clone().requires_grad_() for v in x]
        sums = compiled(*leaves, causal=True, per_head=True)
        grads = torch.autograd.grad(sums, leaves, weight_of(sums))
        assert all(map(torch.equal, (sums, *grads), outputs("auto", *x, True)))


@pytest.mark.usefixtures("native")
def test_the_map_is_never_stored():
    query, key = inputs(1, 3000, 1, 16, 3000)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    with torch.profiler.profile(profile_memory=True) as profile:
        attention_column_sums(*leaves).sum().backward()
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= 3000 * 16 * 4


@given(
    shape=st.tuples(*(st.integers(0, most) for most in (3, 70, 3)), st.integers(1, 40), st.integers(0, 200)),
    causal=st.booleans(),
    # of few float32 numbers one may by chance have a reference without error
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, causal, dtype, layout):
    x = inputs(*shape, dtype=dtype)
    with poisoned():
        sums = attention_column_sums(*(layouts(v)[layout] for v in x), causal=causal, per_head=True)
    assert_within_budget(
        sums.to(dtype), *(reference.attention_column_sums(*v, causal).to(t)
                          for v, t in ((x, dtype), ([y.double() for y in x], torch.float64)))
    )  # fmt: skip


Q, K = torch.ones(2, 3, 4, 8), torch.ones(2, 5, 4, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: attention_column_sums(3, K), TypeError, "query: expected a tensor"),
        (lambda: attention_column_sums(Q, None), TypeError, "key: expected a tensor"),
        (lambda: attention_column_sums(Q[0], K), ValueError, r"query: expected a tensor \[S, N, G, E\]"),
        (lambda: attention_column_sums(Q, K[0]), ValueError, r"key: expected a tensor \[S, M, G, E\]"),
        (lambda: attention_column_sums(Q.int(), K.int()), ValueError, "query: .*int32"),
        (lambda: attention_column_sums(Q[..., :0], K[..., :0]), ValueError, "query: expected at least 1 channel"),
        (lambda: attention_column_sums(Q, K[:, :, :2]), ValueError, r"key: expected \[2, M, 4, 8\]"),
        (lambda: attention_column_sums(Q, K.double()), ValueError, "key: expected query's dtype"),
        (lambda: attention_column_sums(Q, K, causal=1), TypeError, "causal: expected a bool"),
        (lambda: attention_column_sums(Q, K, per_head="yes"), TypeError, "per_head: expected a bool"),
        (lambda: attention_column_sums(Q, K, impl="triton"), RuntimeError, "CUDA devices"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("causal", [False, True])
# keys are split in the first, in float32 in three and in half precision in two
@pytest.mark.parametrize(
    ("shape", "dtype"),
    types_in_turn([(1, 1, 2, 128, 600), SHAPES[0], (2, 20, 1, 64, 130), SHAPES[3], *SHAPES[6:]]),
)
def test_triton_matches_reference(triton, shape, dtype, causal):
    x = inputs(*shape, dtype=dtype)
    sums, stats = triton(MODULE, "attention_column_sums", *x, causal)
    grads = triton(MODULE, "attention_column_sums_backward", weight_of(sums), *x, stats, causal)
    wide = outputs("reference", *(v.double() for v in x), causal)
    low = in_either_order(lambda: outputs("reference", *x, causal), wide)
    assert_within_budget([sums, *grads], low, wide)


def test_triton_keeps_what_is_not_seen_clean(triton):
    query, key = inputs(1, 70, 1, 8, 70)
    query[0, 50, 0, 3] = NAN
    sums, stats = triton(MODULE, "attention_column_sums", query, key, True)
    assert sums[0, 0, :51].isnan().all()
    assert sums[0, 0, 51:].isfinite().all()
    _, to_key = triton(MODULE, "attention_column_sums_backward", weight_of(sums), query, key, stats, True)
    assert to_key[0, 51:, 0, :3].isfinite().all()


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["stats", "share", "combine", "fwd", "query_bwd", "key_bwd"])
@pytest.mark.parametrize(
    ("dtype", "channels"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128)]
)
def test_triton_compiles(kernel, dtype, channels, arch):
    from vmemory.kernels import attention_column_sums as kernels

    signature = dict.fromkeys(("N", "M", "S", "G", "SPLITS"), "i32") | {"SCALE": "fp32"}
    signature |= dict.fromkeys(("query", "key", "to_query", "to_key"), f"*{dtype}")
    signature |= dict.fromkeys(("grad", "stats", "partial", "delta", "out"), "*fp32")
    walked = {"query_bwd": "BLOCK_M", "key_bwd": "BLOCK_N"}.get(kernel, "")
    config = kernels.blocks_of(channels, dtype == "fp32", walked)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"E": channels, "CAUSAL": True, "WHOLE": kernel == "stats", **config}
    jitted = getattr(kernels, f"_attention_column_sums_{kernel.replace('share', 'stats')}_kernel")
    constants = {name: value for name, value in constants.items() if name in jitted.arg_names}
    compiled = compile_triton(jitted, signature, constants, arch, **options)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3000, 2, 128, 3000)])
def test_cuda_matches_reference(shape, dtype, causal):
    x = [v.cuda() for v in inputs(*shape, dtype=dtype)]
    with poisoned():
        actual = outputs("triton", *x, causal)
    assert_within_budget(
        actual, outputs("reference", *x, causal), outputs("reference", *(v.double() for v in x), causal)
    )
