from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention import DTYPES, SHAPES, inputs, outputs, widened
from vmemory.ops.memory_attention import memory_attention
from vmemory.reference import memory_attention as reference
from vmemory.testing import assert_within_budget, layouts, poisoned, random_tensor


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype):
    x = inputs(*shape, dtype=dtype)
    with poisoned():
        actual = outputs("native", *x)
    assert_within_budget(actual, outputs("reference", *x), outputs("reference", *widened(*x)))
    assert torch.equal(memory_attention(*x), actual[0])


def test_is_scaled_dot_product_attention_on_the_valid_slots():
    query, keys, values, count = inputs(1, 20, 2, 16, 6, 5)
    count[:] = 4
    kept = [x[:, :4].flatten(1, 2).transpose(1, 2) for x in (keys, values)]
    wanted = [
        torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2).to(t), *(x.to(t) for x in kept))
        for t in (torch.float32, torch.float64)
    ]
    assert_within_budget(memory_attention(query, keys, values, count), *(w.transpose(1, 2) for w in wanted))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_stream_without_items_gets_zeros_and_passes_none_on(impl):
    query, keys, values, _ = inputs(2, 4, 2, 8, 3, 2)
    keys, values = torch.full_like(keys, torch.nan), torch.full_like(values, torch.inf)
    for out in outputs(impl, query, keys, values, torch.tensor([0, -3])):
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_slots_that_are_not_valid_get_no_gradient(impl):
    query, keys, values, _ = inputs(1, 9, 2, 8, 5, 3)
    count = torch.tensor([2])
    whole = outputs(impl, query, keys, values, count)
    for grad in whole[2:]:
        assert (grad[:, 2:] == 0).all()
        assert (grad[:, :2] != 0).any()
    # an item more than slots changes nothing
    for a, b in zip(
        outputs(impl, query, keys, values, count + 3), outputs(impl, query, keys, values, count + 9), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_gives_the_same_bits(layout):
    query, keys, values, count = inputs(2, 20, 3, 40, 4, 9)
    expected = outputs("native", query, keys, values, count)
    turned = [layouts(x)[layout] for x in (query, keys, values)]
    assert torch.equal(memory_attention(*turned, layouts(count)[layout]), expected[0])
    for leaf in turned:
        leaf.requires_grad_()
    out = memory_attention(*turned, count)
    grad = layouts(random_tensor(*out.shape, seed=4))[layout]
    for got, wanted in zip(torch.autograd.grad(out, turned, grad), expected[1:], strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("native")
# not bfloat16, which torch's kernel takes where there is AMX
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("E", [1, 33, 64, 200])
def test_a_query_does_not_depend_on_its_neighbours(E, dtype):
    """Few queries take a kernel of their own, which sums in the same order."""
    query, keys, values, count = inputs(2, 20, 3, E, 3, 100, dtype=dtype)
    whole = memory_attention(query, keys, values, count)
    for first, last in ((3, 4), (5, 8), (0, 8), (11, 20)):
        assert torch.equal(memory_attention(query[:, first:last], keys, values, count), whole[:, first:last])


@pytest.mark.usefixtures("native")
def test_a_query_does_not_depend_on_the_threads():
    query, keys, values, count = inputs(1, 200, 2, 64, 3, 100)
    whole = memory_attention(query, keys, values, count)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(memory_attention(query, keys, values, count), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("native")
def test_the_same_call_gives_the_same_bits():
    x = inputs(3, 100, 3, 64, 4, 50)
    for first, second in zip(outputs("native", *x), outputs("native", *x), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("where", ["query", "keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_spoil_what_they_reach(where, value):
    query, keys, values, count = inputs(1, 40, 2, 16, 3, 70)
    target = {"query": query, "keys": keys, "values": values}[where]
    target[(0, 5, 1, 3) if where == "query" else (0, 1, 5, 1, 3)] = value
    assert_within_budget(
        memory_attention(query, keys, values, count),
        reference.memory_attention(query, keys, values, count),
        reference.memory_attention(*widened(query, keys, values, count)),
    )


def test_scores_of_minus_infinity_weigh_nothing():
    query, keys, values, count = inputs(1, 3, 1, 4, 2, 200)
    query.abs_()
    keys[0, 0] = -float("inf")
    alone = query, keys[:, 1:], values[:, 1:], count
    wanted = reference.memory_attention(*alone), reference.memory_attention(*widened(*alone))
    assert_within_budget(memory_attention(query, keys, values, count), *wanted)


def test_large_scores_do_not_overflow():
    query, keys, values, count = inputs(1, 33, 2, 16, 3, 70)
    x = query * 1e3, keys * 1e3, values, count
    assert_within_budget(memory_attention(*x), reference.memory_attention(*x), reference.memory_attention(*widened(*x)))


@pytest.mark.usefixtures("native")
def test_gradcheck():
    query, keys, values, count = inputs(3, 4, 2, 3, 3, 2, dtype=torch.float64)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    leaves = [x.requires_grad_() for x in (query, keys, values)]
    assert torch.autograd.gradcheck(lambda *x: memory_attention(*x, count), leaves)


@pytest.mark.parametrize("needing", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_for_some_inputs_only(needing):
    *x, count = inputs(1, 20, 2, 16, 3, 5)
    expected = outputs("auto", *x, count)
    leaves = [v.clone().requires_grad_(need) for v, need in zip(x, needing, strict=True)]
    out = memory_attention(*leaves, count)
    out.backward(random_tensor(*out.shape, seed=4))
    for leaf, need, wanted in zip(leaves, needing, expected[1:], strict=True):
        assert torch.equal(leaf.grad, wanted) if need else leaf.grad is None


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    query, keys, values, count = inputs(2, 20, 2, 16, 3, 5, dtype=dtype)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    for wide in (True, False):
        torch.library.opcheck(
            torch.ops.vmemory.memory_attention.default, (query, keys, values, count, None, None, wide)
        )
    out, stats = torch.ops.vmemory.memory_attention(query, keys, values, count, None, None, True)
    for for_memory in (True, False):
        torch.library.opcheck(
            torch.ops.vmemory.memory_attention_backward.default,
            (torch.ones_like(query), query, keys, values, count, None, None, out, stats, for_memory),
        )


@pytest.mark.parametrize(
    ("backend", "dtype"), [("aot_eager", torch.bfloat16), ("inductor", torch.bfloat16), ("inductor", torch.float32)]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(memory_attention, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (5, 9):
        *x, count = inputs(2, tokens, 2, 16, 3, tokens, dtype=dtype)
        leaves = [v.clone().requires_grad_() for v in x]
        out = compiled(*leaves, count)
        grads = torch.autograd.grad(out, leaves, random_tensor(*out.shape, dtype=dtype, seed=4))
        expected = outputs("auto", *x, count)
        assert torch.equal(out, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1:], strict=True))


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 3), st.integers(1, 40)),
    # over one key alone the gradient of the query is 0, and so is the budget for what two orders of sums leave of it
    memory=st.tuples(st.integers(0, 5), st.integers(0, 60).filter(lambda n: n != 1)),
    counts=st.lists(st.integers(-1, 7), min_size=3, max_size=3),
    # one float32 number may by chance have a reference without error
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(sizes, memory, counts, dtype, layout):
    query, keys, values, _ = inputs(*sizes, *memory, dtype=dtype)
    x = *(layouts(v.nan_to_num())[layout] for v in (query, keys, values)), torch.tensor(counts[: sizes[0]]).long()
    with poisoned():
        actual = outputs("auto", *x)
    assert_within_budget(actual, outputs("reference", *x), outputs("reference", *widened(*x)))


def swapped(**changes: object) -> dict:
    query, keys, values, count = inputs(1, 4, 2, 8, 3, 5)
    return {"query": query, "key_slots": keys, "value_slots": values, "count": count} | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"query": 3}, TypeError, "query: expected a tensor"),
        ({"query": torch.ones(4, 2, 8)}, ValueError, r"query: expected a tensor \[S, N, G, E\]"),
        ({"query": torch.ones(1, 4, 2, 8).int()}, ValueError, "query: .*int32"),
        ({"query": torch.ones(1, 4, 2, 0)}, ValueError, "query: expected at least 1 channel"),
        ({"query": torch.ones(1, 4, 2, 9)}, ValueError, r"key_slots: expected \[1, M, n, 2, 9\]"),
        ({"query": torch.ones(1, 4, 2, 8).double()}, ValueError, "key_slots: expected query's dtype"),
        ({"key_slots": torch.ones(1, 3, 2, 8)}, ValueError, r"key_slots: expected a tensor \[S, M, n, G, E\]"),
        ({"value_slots": torch.ones(1, 3, 4, 2, 8)}, ValueError, "value_slots: expected key_slots'"),
        ({"value_slots": torch.ones(1, 3, 5, 2, 8).half()}, ValueError, "value_slots: expected query's dtype"),
        ({"count": 3}, TypeError, "count: expected a tensor"),
        ({"count": torch.ones(2, dtype=torch.int64)}, ValueError, r"count: expected torch.int64 of shape \[1\]"),
        ({"count": torch.ones(1, dtype=torch.int32)}, ValueError, "count: expected torch.int64"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        memory_attention(**swapped(**changes))
