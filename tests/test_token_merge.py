from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import types_in_turn
from vmemory.ops import (
    MergePlan,
    bipartite_match,
    merge_source,
    proportional_attention_bias,
    token_merge,
    token_unmerge,
)
from vmemory.ops._native import STATUS
from vmemory.ops.token_merge import MergedTokens
from vmemory.reference import token_merge as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.token_merge"
# clips, tokens, channels, r, options of the match
CASES = [
    (2, 63, 17, 20, {}), (1, 1000, 64, 480, {"protected": 1}), (3, 50, 1000, 10, {"cls": 3}),
    (6, 33, 24, 30, {"cls": 1, "groups": 3}), (1, 999, 63, 0, {}),
]  # fmt: skip
EDGES = [
    (0, 9, 4, 3, {}), (2, 0, 4, 3, {}), (2, 9, 0, 3, {}), (1, 1, 1, 0, {}), (2, 2, 3, 1, {}),
    (0, 0, 0, 0, {"groups": 5}),
]  # fmt: skip


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan_of(clips: int, tokens: int, r: int, options: dict) -> MergePlan:
    """Few directions: some tokens take in many others."""
    kinds = torch.randint(0, 9, (clips, tokens), generator=torch.Generator().manual_seed(tokens))
    return bipartite_match(random_tensor(9, 12)[kinds], r, **options)


def inputs(
    clips: int, tokens: int, channels: int, r: int, options: dict, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, MergePlan, Tensor]:
    x = random_tensor(clips, tokens, channels, dtype=dtype)
    size = torch.randint(0, 4, (clips, tokens, 1), generator=torch.Generator().manual_seed(1))
    return x, plan_of(clips, tokens, r, options), size.to(wide_of(dtype))


def differentiate(x: Tensor, plan: MergePlan, size: Tensor | None, impl: str) -> tuple[Tensor, ...]:
    """Merged tokens, the tokens spread again, and the gradient through both."""
    x = x.detach().requires_grad_()
    merged = token_merge(x, plan, size, impl=impl)
    back = token_unmerge(merged.x, plan, impl=impl)
    weight = random_tensor(*back.shape, dtype=back.dtype, device=back.device, seed=5)
    (through,) = torch.autograd.grad(back, x, weight)
    return merged.x.detach(), merged.size, back.detach(), through


def judge(x: Tensor, plan: MergePlan, size: Tensor | None, impl: str = "native") -> None:
    with poisoned():
        actual = differentiate(x, plan, size, impl)
    low = differentiate(x, plan, size, "reference")
    exact = differentiate(x.double(), plan, None if size is None else size.double(), "reference")
    assert_within_budget(actual, low, exact)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *EDGES])
def test_native_matches_reference(case, dtype):
    x, plan, size = inputs(*case, dtype)
    judge(x, plan, size)
    judge(x, plan, None)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_nothing_joins_keep_their_bits(dtype, impl):
    x, plan, size = inputs(2, 63, 17, 12, {}, dtype)
    x[0, 5] = float("nan")
    merged = token_merge(x, plan, size * 3, impl=impl).x
    alone = plan.start.diff() == 1
    kept = x.gather(1, plan.kept[..., None].expand(-1, -1, 17))
    assert alone.any()
    assert torch.equal(merged[alone].nan_to_num(7), kept[alone].nan_to_num(7))
    # a NaN spoils the token it is part of and no other
    spoiled = torch.zeros_like(alone)
    spoiled[0, plan.place[0, 5]] = True
    assert torch.equal(merged.isnan().any(-1), spoiled)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_means_are_weighted_by_size(impl):
    metric = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]])
    plan = bipartite_match(metric, 2)
    x = torch.tensor([[[8.0], [4], [1], [3]]])
    size = torch.tensor([[[1.0], [3], [0], [0]]])
    merged = token_merge(x, plan, size, impl=impl)
    # the second pair has no size at all: it counts alike
    assert merged.x.flatten().tolist() == [5.0, 2.0]
    assert merged.size.flatten().tolist() == [4.0, 0.0]
    assert token_merge(x, plan, impl=impl).x.flatten().tolist() == [6.0, 2.0]
    assert token_unmerge(merged.x, plan, impl=impl).flatten().tolist() == [5.0, 5.0, 2.0, 2.0]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("sized", [False, True])
def test_gradcheck(sized):
    x, plan, size = inputs(4, 9, 3, 6, {"cls": 1, "groups": 2}, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_merge(x, plan, size if sized else None).x, x)
    merged = random_tensor(2, 12, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_unmerge(x, plan), merged)


@pytest.mark.usefixtures("native")
def test_opcheck():
    x, plan, size = inputs(2, 30, 8, 12, {})
    ops, size = torch.ops.vmemory, size[..., 0]
    merged, total = ops.token_merge(x, size, plan.order, plan.start)
    for held in (size, None):
        torch.library.opcheck(ops.token_merge.default, (x, held, plan.order, plan.start))
        torch.library.opcheck(ops.token_merge_backward.default, (merged, held, total, plan.place, plan.start))
    torch.library.opcheck(ops.token_unmerge.default, (merged, plan.place))
    torch.library.opcheck(ops.token_unmerge_backward.default, (x, plan.order, plan.start))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(backend, dynamic):
    def block(x: Tensor, size: Tensor, r: int) -> tuple[Tensor, ...]:
        plan = bipartite_match(x, r, 1)
        merged = token_merge(x, plan, size)
        bias = proportional_attention_bias(merged.size)
        back = token_unmerge(merged.x, plan)
        return merged.x, merged.size, bias, back, plan.kept

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens, r in ((20, 6), (31, 9)):
        x, size = random_tensor(2, tokens, 12), random_tensor(2, tokens, 1, seed=1).abs()
        exact = block(x.double(), size.double(), r)
        assert_within_budget(compiled(x, size, r), block(x, size, r), exact)
        variables = [x.clone().requires_grad_() for _ in range(2)]
        for function, variable in zip((compiled, block), variables, strict=True):
            function(variable, size, r)[3].square().sum().backward()
        assert torch.equal(variables[0].grad, variables[1].grad)


@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_merges_alike(layout):
    for case in ((4, 51, 19, 12, {}), (4, 51, 19, 30, {"cls": 1, "groups": 2})):
        x, plan, size = inputs(*case)
        merged, turned = token_merge(x, plan, size), token_merge(layouts(x)[layout], plan, layouts(size)[layout])
        assert torch.equal(merged.x, turned.x)
        assert torch.equal(merged.size, turned.size)
        assert torch.equal(token_unmerge(merged.x, plan), token_unmerge(layouts(merged.x)[layout], plan))


def test_repeated_calls_and_thread_counts_agree():
    threads = torch.get_num_threads()
    x, plan, size = inputs(3, 1301, 700, 500, {})
    before = differentiate(x, plan, size, "auto")
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for actual, expected in zip(differentiate(x, plan, size, "auto"), before, strict=True):
                assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(threads)


@given(
    clips=st.integers(0, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(0, 40),
    channels=st.integers(0, 40),
    part=st.floats(0, 1),
    sized=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_merge(clips, groups, tokens, channels, part, sized, dtype, layout):
    x, plan, size = inputs(clips * groups, tokens, channels, int(part * groups * tokens / 2), {"groups": groups}, dtype)
    x = layouts(x)[layout]
    if x.numel() == 0:
        assert token_merge(x, plan, size).x.shape == (clips, plan.start.shape[1] - 1, channels)
        return
    judge(x, plan, size if sized else None, "auto")


def test_no_gradient_reaches_the_size():
    x, plan, size = inputs(2, 10, 4, 3, {})
    merged = token_merge(x.requires_grad_(), plan, size.requires_grad_())
    assert not merged.size.requires_grad
    merged.x.sum().backward()
    assert size.grad is None


def test_bias_counts_a_merged_key_as_often_as_it_has_tokens():
    query, keys, values = random_tensor(3, 2, 1, 5, 8, dtype=torch.float64)
    size = torch.tensor([1.0, 3, 0, 2, 1], dtype=torch.float64)[None, :, None].expand(2, -1, -1)
    bias = proportional_attention_bias(size)
    assert bias.shape == (2, 1, 1, 5)
    actual = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
    repeats = torch.tensor([0, 1, 1, 1, 3, 3, 4])
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, repeats], values[:, :, repeats])
    torch.testing.assert_close(actual, expected)
    assert proportional_attention_bias(size.float(), torch.bfloat16).dtype == torch.bfloat16


X = torch.ones(4, 6, 3)
PLAN = bipartite_match(X, 2)
MERGED = torch.ones(4, 4, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: token_merge([1.0], PLAN), TypeError, "x: expected a tensor"),
        (lambda: token_merge(X.int(), PLAN), ValueError, "x: .*int32"),
        (lambda: token_merge(X, tuple(PLAN)), TypeError, "plan: expected a MergePlan"),
        (lambda: token_merge(X[:, :5], PLAN), ValueError, r"x: expected \[4, 6, D\] to fit plan"),
        (lambda: token_merge(X, PLAN, [1.0]), TypeError, "size: expected a tensor"),
        (lambda: token_merge(X, PLAN, X), ValueError, r"size: expected \[4, 6, 1\], got shape \[4, 6, 3\]"),
        (lambda: token_merge(X, PLAN, X[..., :1].half()), ValueError, "size: expected torch.float32"),
        (lambda: token_merge(X, PLAN, impl="triton"), RuntimeError, "token_merge: impl='triton' cannot run"),
        (lambda: token_merge(X.to("meta"), PLAN), ValueError, "plan: expected x's device meta"),
        (lambda: token_unmerge(X, PLAN), ValueError, r"x: expected \[4, 4, D\] to fit plan"),
        (lambda: token_unmerge(MERGED, None), TypeError, "plan: expected a MergePlan"),
        (lambda: token_unmerge(MERGED, PLAN, impl="best"), ValueError, "impl: expected"),
        (lambda: proportional_attention_bias(X), ValueError, r"size: expected \[B, N, 1\]"),
        (lambda: proportional_attention_bias(X[..., :1].long()), ValueError, "size: .*int64"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("case", "dtype"), types_in_turn([CASES[0], (1, 300, 1100, 140, {}), CASES[3], *EDGES]))
def test_triton_matches(triton, case, dtype):
    x, plan, held = inputs(*case, dtype)
    place, order, start, _ = plan
    x = x.reshape(*place.shape, x.shape[2])
    for size in (held.reshape(place.shape), None):
        tokens = start.shape[1] - 1
        merged, total = triton(MODULE, "token_merge", x, size, order, start)
        back = triton(MODULE, "token_unmerge", merged, place)
        weight = random_tensor(*x.shape, dtype=dtype, seed=5)
        grad = triton(MODULE, "token_unmerge_backward", weight, order, start)
        grad = triton(MODULE, "token_merge_backward", grad, size, total, place, start)
        plain = MergePlan(place, order, start, 1)
        sizes = None if size is None else size[..., None]
        low = differentiate(x, plain, sizes, "reference")
        exact = differentiate(x.double(), plain, None if size is None else sizes.double(), "reference")
        assert_within_budget((merged, total[..., None], back, grad), low, exact)
        assert torch.equal(total, reference.token_merge(x, size, place, tokens)[1])


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("name", ["mean", "sum", "shares", "copy"])
def test_triton_compiles_ahead_of_time(name, sized, dtype, arch):
    from vmemory.kernels import token_merge as kernels

    sizes = dict.fromkeys(("M", "N", "D"), "i32")
    tensors = dict.fromkeys(("x", "out"), f"*{dtype}") | dict.fromkeys(("size", "totals"), "*fp32")
    tensors |= dict.fromkeys(("order", "starts", "places"), "*i64")
    gathers = name in ("mean", "sum")
    kernel = kernels._token_sum_kernel if gathers else kernels._token_spread_kernel
    constants = {"HAS_SIZE": sized, "BLOCK_D": 1024, "MEAN" if gathers else "SHARED": name in ("mean", "shares")}
    compiled = compile_triton(kernel, tensors | sizes, constants, arch)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", [*CASES, *EDGES])
def test_cuda_matches_reference(case, dtype, impl):
    if impl == "native" and not STATUS.cuda:
        pytest.skip(STATUS.cuda_reason)
    x, plan, size = inputs(*case, dtype)
    plan = MergePlan(*(t.cuda() for t in plan[:3]), plan.groups)
    judge(x.cuda(), plan, size.cuda(), impl)
    judge(x.cuda(), plan, None, impl)


def test_the_result_has_names():
    x, plan, _ = inputs(2, 8, 3, 2, {})
    merged = token_merge(x, plan)
    assert isinstance(merged, MergedTokens)
    assert (merged.x.shape, merged.size.shape) == ((2, 6, 3), (2, 6, 1))


def test_sources_through_several_plans():
    x = torch.eye(24, dtype=torch.float64)[None].expand(4, -1, -1).contiguous()
    first = bipartite_match(random_tensor(4, 24, 8), 6, cls=1)
    merged = token_merge(x, first)
    second = bipartite_match(random_tensor(4, 18, 8, seed=1), 9, cls=1, groups=2)
    merged = token_merge(merged.x, second, merged.size)
    third = bipartite_match(random_tensor(2, 27, 8, seed=2), 5, cls=2)
    merged = token_merge(merged.x, third, merged.size)
    source = merge_source(third, merge_source(second, merge_source(first)))
    assert source.shape == (2, 48)
    held = torch.zeros(2, 22, 48, dtype=torch.float64).scatter_(1, source[:, None], 1.0)
    assert torch.equal(held.sum(-1, keepdim=True), merged.size)
    # every original token adds 1 to its own channel, and both clips of a group share the channels
    torch.testing.assert_close(held.view(2, 22, 2, 24).sum(2), merged.x * merged.size)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_groups_are_matched_as_one_sequence(impl):
    clips = random_tensor(6, 10, 16)
    rows = clips.view(2, 3, 10, 16)
    joined = torch.cat([rows[:, :, :2].flatten(1, 2), rows[:, :, 2:].flatten(1, 2)], 1)
    apart = token_merge(clips, bipartite_match(clips, 8, cls=2, groups=3, impl=impl))
    together = token_merge(joined, bipartite_match(joined, 8, cls=6, impl=impl))
    assert torch.equal(apart.x, together.x)
    assert torch.equal(apart.size, together.size)
