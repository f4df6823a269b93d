from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vmemory
from tests.similarity import (
    FLOATING,
    INF,
    METRICS,
    NAN,
    SHAPES,
    assert_finds,
    filters,
    int8_memory,
    memory_with_ties,
    norms_of,
)
from vmemory.ops.similarity_topk import similarity_topk
from vmemory.reference import similarity_topk as reference
from vmemory.testing import assert_within_budget, layouts, poisoned, random_tensor


def gradients(impl, query, memory, k, metric, scale=None, **kwargs):
    query = query.clone().requires_grad_()
    variables = [query] if memory.dtype == torch.int8 else [query, memory.clone().requires_grad_()]
    found = similarity_topk(query, variables[-1] if scale is None else memory, k, metric=metric, scale=scale,
                            impl=impl, **kwargs)  # fmt: skip
    weight = random_tensor(*found.values.shape, seed=7).to(query.device, found.values.dtype)
    return torch.autograd.grad(found.values, variables, torch.where(found.indices < 0, 0, weight))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), SHAPES)
def test_native_matches_reference(S, Q, M, D, k, dtype, metric):
    query, memory = random_tensor(S, Q, D, dtype=dtype), memory_with_ties(S, M, D, dtype)
    for kwargs in ({}, filters(S, M)):
        with poisoned():
            found = similarity_topk(query, memory, k, metric=metric, **kwargs)
        assert_finds(found, query, memory, k, metric, **kwargs)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), SHAPES)
def test_native_matches_reference_in_int8(S, Q, M, D, k, dtype, metric):
    query, (memory, scale) = random_tensor(S, Q, D, dtype=dtype), int8_memory(S, M, D)
    for kwargs in ({}, filters(S, M)):
        with poisoned():
            found = similarity_topk(query, memory, k, metric=metric, scale=scale, **kwargs)
        assert_finds(found, query, memory, k, metric, scale=scale, **kwargs)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [1, 8, 9, 16, 17, 33, 64, 70])
def test_queries_do_not_influence_each_other(queries, metric):
    query, memory = random_tensor(1, queries, 48), memory_with_ties(1, 3000, 48)
    found = similarity_topk(query, memory, 6, metric=metric)
    decided = assert_finds(found, query, memory, 6, metric)
    assert decided.float().mean() > 0.9
    for q in (0, queries // 2, queries - 1):
        alone = similarity_topk(query[:, q : q + 1], memory, 6, metric=metric)
        assert torch.equal(alone.values[:, 0], found.values[:, q])
        assert torch.equal(alone.indices[:, 0], found.indices[:, q])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [*FLOATING, torch.int8])
def test_equal_rows_tie_wherever_they_lie(dtype, metric):
    M, D = 20_011, 37
    at = [0, 3, 4, 63, 64, 127, 5001, 10_004, 10_005, 10_006, 15_017, M - 2, M - 1]
    query = random_tensor(1, 5, D, dtype=torch.float32 if dtype == torch.int8 else dtype)
    rows, scale = int8_memory(1, M, D) if dtype == torch.int8 else (random_tensor(1, M, D, dtype=dtype, seed=3), None)
    twin = (query[:, :1].float() * 40).clamp(-127, 127).to(dtype)
    rows[:, at] = twin
    if scale is not None:
        scale[:, at] = 1.0
    threads, before = torch.get_num_threads(), None
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found = similarity_topk(query, rows, 20, metric=metric, scale=scale)
            assert found.indices[0, 0, : len(at)].tolist() == at
            assert len(set(found.values[0, 0, : len(at)].tolist())) == 1
            assert before is None or all(map(torch.equal, before, found))
            before = found
    finally:
        torch.set_num_threads(threads)
    few = similarity_topk(query[:, :1], rows, 4, metric=metric, scale=scale)
    assert few.indices[0, 0].tolist() == at[:4]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_infinities_and_zeros(metric, impl):
    memory = torch.tensor([[[1.0, 0], [NAN, 0], [0, 0], [2, 0], [0, NAN], [-1, 0]]])
    query = torch.tensor([[[1.0, 0], [0, 0]]])
    found = similarity_topk(query, memory, 6, metric=metric, impl=impl)
    assert found.indices[0, 0].tolist() == ([1, 4, 3, 0, 2, 5] if metric == "dot" else [1, 4, 0, 3, 2, 5])
    assert found.values[0, 0, :2].isnan().all()
    assert found.indices[0, 1].tolist() == [1, 4, 0, 2, 3, 5]
    least = torch.tensor([[[-INF, 1], [1, 1], [-INF, 2]]])
    found = similarity_topk(torch.ones(1, 1, 2), least, 4, metric="dot", impl=impl)
    assert found.indices.tolist() == [[[1, 0, 2, -1]]]
    assert found.values.tolist() == [[[2, -INF, -INF, -INF]]]


@pytest.mark.usefixtures("native")
def test_nan_rows_fill_every_place():
    memory = random_tensor(1, 5000, 8)
    memory[:, ::3] = NAN
    found = similarity_topk(random_tensor(1, 3, 8), memory, 40)
    assert torch.equal(found.indices, (3 * torch.arange(40)).expand(1, 3, 40))
    assert found.values.isnan().all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_slots_that_are_not_searched_have_no_influence(impl):
    query, memory = random_tensor(4, 3, 16), random_tensor(4, 200, 16)
    count, where = torch.tensor([0, -7, 60, 900]), torch.rand(4, 200) > 0.5
    found = similarity_topk(query, memory, 30, count=count, where=where, impl=impl)
    dirty = memory.clone()
    dirty[~(where & (torch.arange(200) < count[:, None]))] = NAN
    again = similarity_topk(query, dirty, 30, count=count, where=where, impl=impl)
    assert torch.equal(found.values, again.values)
    assert torch.equal(found.indices, again.indices)
    assert (found.indices[:2] == -1).all()
    assert (found.values[:2] == -INF).all()
    nothing = similarity_topk(query, dirty, 3, where=torch.zeros(4, 200, dtype=torch.bool), impl=impl)
    assert (nothing.indices == -1).all()
    assert (nothing.values == -INF).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("queries", [1, 3, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_filter_changes_no_score(dtype, queries):
    M, D = 1003, 70
    query = random_tensor(1, queries, D, dtype=torch.float32 if dtype == torch.int8 else dtype)
    rows, scale = int8_memory(1, M, D) if dtype == torch.int8 else (random_tensor(1, M, D, dtype=dtype), None)
    plain = similarity_topk(query, rows, M, scale=scale)
    every = similarity_topk(query, rows, M, scale=scale, where=torch.ones(1, M, dtype=torch.bool))
    assert all(map(torch.equal, plain, every))
    # whole eights that are in and out, and edges anywhere
    place = torch.arange(M)
    for where in (place % 64 < 8, place > 500, place < 129, (place // 8 % 2 == 0) ^ (place % 97 == 3), place == M - 1):
        found = similarity_topk(query, rows, M, scale=scale, where=where[None])
        kept = where[plain.indices]
        count = int(where.sum())
        assert torch.equal(found.indices[..., :count], plain.indices[kept].view(1, queries, count))
        assert torch.equal(found.values[..., :count], plain.values[kept].view(1, queries, count))
        assert (found.indices[..., count:] == -1).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [*FLOATING, torch.int8])
def test_norms_that_are_kept(dtype, impl):
    query = random_tensor(2, 3, 33, dtype=torch.float32 if dtype == torch.int8 else dtype)
    rows, scale = int8_memory(2, 300, 33) if dtype == torch.int8 else (memory_with_ties(2, 300, 33, dtype), None)
    norm, chosen = norms_of(rows, scale, query.dtype), filters(2, 300)
    found = similarity_topk(query, rows, 9, scale=scale, norm=norm, impl=impl, **chosen)
    assert_finds(found, query, rows, 9, scale=scale, **chosen)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [*FLOATING, torch.int8])
def test_a_cpu_takes_kept_norms_as_they_are(dtype, impl):
    query = random_tensor(2, 3, 33, dtype=torch.float32 if dtype == torch.int8 else dtype)
    rows, scale = int8_memory(2, 300, 33) if dtype == torch.int8 else (memory_with_ties(2, 300, 33, dtype), None)
    norm = norms_of(rows, scale, query.dtype)
    # clamped like the others, and only for a cosine
    doubled = similarity_topk(query, rows, 9, scale=scale, norm=2 * norm, impl=impl)
    assert torch.equal(doubled.values * 2, similarity_topk(query, rows, 9, scale=scale, norm=norm, impl=impl).values)
    nothing = torch.zeros_like(norm)
    assert similarity_topk(query, rows, 9, scale=scale, norm=nothing, impl=impl).values.isfinite().all()
    assert all(
        map(
            torch.equal,
            similarity_topk(query, rows, 9, metric="dot", scale=scale, norm=nothing, impl=impl),
            similarity_topk(query, rows, 9, metric="dot", scale=scale, impl=impl),
        )
    )


@pytest.mark.usefixtures("native")
def test_gradients_beside_kept_norms():
    query, memory = random_tensor(2, 3, 24), random_tensor(2, 80, 24)
    kept = gradients("native", query, memory, 9, "cosine", norm=memory.norm(dim=-1))
    assert_within_budget(
        kept,
        gradients("reference", query, memory, 9, "cosine"),
        gradients("reference", query.double(), memory.double(), 9, "cosine"),
    )


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_finds_alike(layout):
    query, (memory, scale) = random_tensor(2, 9, 20), int8_memory(2, 90, 20)
    chosen = filters(2, 90)
    turned = {name: layouts(x)[layout] for name, x in {**chosen, "scale": scale}.items()}
    for rows, options, kwargs in ((memory, turned, {**chosen, "scale": scale}), (random_tensor(2, 90, 20), {}, {})):
        found = similarity_topk(layouts(query)[layout], layouts(rows)[layout], 8, **options)
        assert all(map(torch.equal, found, similarity_topk(query, rows, 8, **kwargs)))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), SHAPES)
def test_gradients(S, Q, M, D, k, dtype, metric):
    query, memory, kwargs = random_tensor(S, Q, D, dtype=dtype), memory_with_ties(S, M, D, dtype), filters(S, M)
    with poisoned():
        actual = gradients("native", query, memory, k, metric, **kwargs)
    # the same places, so that a pair that differs by a rounding cannot swap its weights
    values, indices = similarity_topk(query, memory, k, metric=metric, **kwargs)
    weight = torch.where(indices < 0, 0, random_tensor(*values.shape, seed=7).to(values.dtype))
    expected = reference.similarity_topk_backward(weight, values, indices, query, memory, None, metric, True, True)
    wide = [x.double() for x in (weight, values, query, memory)]
    truth = reference.similarity_topk_backward(wide[0], wide[1], indices, *wide[2:], None, metric, True, True)
    assert_within_budget(actual, expected, truth)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_gradient_of_the_query_beside_int8(dtype, metric):
    query, (memory, scale) = random_tensor(2, 5, 24, dtype=dtype), int8_memory(2, 80, 24)
    with poisoned():
        (actual,) = gradients("native", query, memory, 9, metric, scale)
    values, indices = similarity_topk(query, memory, 9, metric=metric, scale=scale)
    weight = random_tensor(*values.shape, seed=7).to(values.dtype)
    plain = (weight, values, indices, query, memory, scale, metric, True, False)
    wide = (weight.double(), values.double(), indices, query.double(), memory, scale, metric, True, False)
    expected, truth = (reference.similarity_topk_backward(*x)[0] for x in (plain, wide))
    assert_within_budget(actual, expected, truth)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric):
    query, memory = (random_tensor(2, n, 5, dtype=torch.float64, seed=n).requires_grad_() for n in (3, 12))
    count = torch.tensor([12, 3])
    assert torch.autograd.gradcheck(
        lambda q, m: similarity_topk(q, m, 3, count=count, metric=metric).values, (query, memory)
    )


@pytest.mark.usefixtures("native")
def test_gradients_are_given_once():
    query, memory = random_tensor(1, 2, 8).requires_grad_(), random_tensor(1, 20, 8)
    found = similarity_topk(query, memory, 3)
    assert not found.indices.requires_grad
    (once,) = torch.autograd.grad(found.values.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(once.sum(), query)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    query, memory = random_tensor(2, 3, 20, dtype=dtype), random_tensor(2, 40, 20, dtype=dtype)
    rows, scale = int8_memory(2, 40, 20)
    chosen = filters(2, 40)
    forward, backward = torch.ops.vmemory.similarity_topk.default, torch.ops.vmemory.similarity_topk_backward.default
    torch.library.opcheck(forward, (query, memory, None, None, None, None, 4, "dot"))
    torch.library.opcheck(
        forward, (query, rows, chosen["count"], chosen["where"], scale, norms_of(rows, scale, dtype), 50, "cosine")
    )
    values, indices = forward(query, memory, None, None, None, None, 4, "cosine")
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (values, values, indices, query, memory, None, "cosine", *wanted))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(similarity_topk, fullgraph=True, backend=backend, dynamic=dynamic)
    for slots in (40, 70):
        query, memory, kwargs = random_tensor(2, 3, 20), random_tensor(2, slots, 20), filters(2, slots)
        assert all(map(torch.equal, compiled(query, memory, 5, **kwargs), similarity_topk(query, memory, 5, **kwargs)))
        variables = [(query.clone().requires_grad_(), memory.clone().requires_grad_()) for _ in range(2)]
        for run, pair in zip((compiled, similarity_topk), variables, strict=True):
            values, indices = run(*pair, 5, **kwargs)
            torch.where(indices < 0, 0, values).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*variables, strict=True))


@pytest.mark.usefixtures("native")
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 150), st.integers(0, 40)),
    k=st.integers(1, 60),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([*FLOATING, torch.int8]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
    filtered=st.sampled_from([(), ("count",), ("where",), ("count", "where")]),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_any_search(shape, k, metric, dtype, layout, filtered, normed, seed):
    S, Q, M, D = shape
    query = random_tensor(S, Q, D, dtype=torch.float32 if dtype == torch.int8 else dtype, seed=seed)
    memory, scale = (
        int8_memory(S, M, D, seed + 1) if dtype == torch.int8 else (memory_with_ties(S, M, D, dtype, seed + 1), None)
    )
    chosen = {name: x for name, x in filters(S, M, seed).items() if name in filtered}
    norm = layouts(norms_of(memory, scale, query.dtype))[layout] if normed else None
    with poisoned():
        found = similarity_topk(
            layouts(query)[layout], layouts(memory)[layout], k, metric=metric, scale=scale, norm=norm, **chosen
        )
    assert_finds(found, query, memory, k, metric, scale=scale, **chosen)


Q, M = torch.ones(2, 3, 8), torch.ones(2, 9, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: similarity_topk([1.0], M, 1), TypeError, "query: expected a tensor"),
        (lambda: similarity_topk(Q, None, 1), TypeError, "memory: expected a tensor"),
        (lambda: similarity_topk(Q[0], M, 1), ValueError, r"query: expected a tensor \[S, Q, D\]"),
        (lambda: similarity_topk(Q, M[0], 1), ValueError, r"memory: expected a tensor \[S, M, D\]"),
        (lambda: similarity_topk(Q.long(), M, 1), ValueError, "query: .*int64"),
        (lambda: similarity_topk(Q, M.double(), 1), ValueError, "memory: expected query's dtype"),
        (lambda: similarity_topk(Q[..., :7], M, 1), ValueError, r"query: expected \[2, Q, 8\]"),
        (lambda: similarity_topk(Q[:1], M, 1), ValueError, r"query: expected \[2, Q, 8\]"),
        (lambda: similarity_topk(Q, M.to("meta"), 1), ValueError, "memory: expected query's device"),
        (lambda: similarity_topk(Q, M, 0), ValueError, "k: expected between 1 and 1024, got 0"),
        (lambda: similarity_topk(Q, M, 1025), ValueError, "k: expected between 1 and 1024, got 1025"),
        (lambda: similarity_topk(Q, M, 1.0), TypeError, "k: expected an int"),
        (lambda: similarity_topk(Q, M, True), TypeError, "k: expected an int"),
        (lambda: similarity_topk(Q, M, 1, metric="l2"), ValueError, "metric: expected one of 'cosine', 'dot'"),
        (lambda: similarity_topk(Q, M.char(), 1), ValueError, "scale: expected one with int8"),
        (lambda: similarity_topk(Q, M, 1, scale=M[..., 0]), ValueError, "scale: expected one with int8"),
        (lambda: similarity_topk(Q, M.char(), 1, scale=M[0, :, 0]), ValueError, r"scale: expected .*\[2, 9\]"),
        (lambda: similarity_topk(Q, M, 1, norm=M[0, :, 0]), ValueError, r"norm: expected torch.float32 .*\[2, 9\]"),
        (lambda: similarity_topk(Q, M, 1, norm=M[..., 0].double()), ValueError, "norm: expected torch.float32"),
        (lambda: similarity_topk(Q, M, 1, norm=1.0), TypeError, "norm: expected a tensor, got float"),
        (lambda: similarity_topk(Q, M, 1, count=3), TypeError, "count: expected a tensor, got int"),
        (lambda: similarity_topk(Q, M, 1, count=torch.ones(2)), ValueError, "count: expected torch.int64"),
        (lambda: similarity_topk(Q, M, 1, count=torch.ones(3).long()), ValueError, r"count: .*\[2\]"),
        (lambda: similarity_topk(Q, M, 1, where=torch.ones(2, 9)), ValueError, "where: expected torch.bool"),
        (lambda: similarity_topk(Q, M, 1, where=torch.ones(2, 8) > 0), ValueError, r"where: .*\[2, 9\]"),
        (lambda: similarity_topk(Q, M, 1, impl="cuda"), ValueError, "impl: expected"),
        (lambda: similarity_topk(Q, M, 1, impl="triton"), RuntimeError, "CUDA devices"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_explain_names_every_implementation():
    said = vmemory.explain(similarity_topk, Q, M, 2)
    assert {said.impl, *said.rejected} == {"native", "triton", "reference"}
