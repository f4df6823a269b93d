from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.selection import DTYPES, NAN, clip, gradients, scores_with_ties
from vmemory.ops import compact, select_tokens
from vmemory.reference import select_tokens as reference
from vmemory.testing import assert_within_budget, layouts, poisoned, random_tensor


def assert_selects_as_reference(scores, budget, segments=None):
    with poisoned():
        actual = select_tokens(scores, budget, segments)
    indices, count = reference.select_tokens(scores, [budget] if segments is None else budget, segments)
    if segments is None:
        assert torch.equal(actual, indices)
    else:
        assert torch.equal(actual.indices, indices)
        assert torch.equal(actual.count, count)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "budget"),
    [((2, 63), 17), ((1, 1000), 999), ((3, 64), 0), ((2, 9), 9), ((1, 200_000), 40_001), ((0, 5), 2), ((2, 0), 0)],
)
def test_native_matches_reference(shape, budget, dtype):
    assert_selects_as_reference(random_tensor(*shape, dtype=dtype), budget)
    assert_selects_as_reference(scores_with_ties(*shape, dtype=dtype), budget)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "budgets"),
    [
        ((2, 63), (5, 0, 40)),
        ((1, 1000), (1,) * 20),
        ((3, 70), ()),
        ((2, 0), (3, 1)),
        ((1, 30), (30, 30)),
        ((0, 5), (2,)),
    ],
)
def test_native_matches_reference_by_segment(shape, budgets, dtype):
    segments = torch.randint(-1, len(budgets) + 1, shape, generator=torch.Generator().manual_seed(1))
    for ids in (segments, segments.sort(-1).values, segments[:1].expand(shape) if shape[0] else segments):
        assert_selects_as_reference(scores_with_ties(*shape, dtype=dtype), budgets, ids)
    if shape[0]:
        assert_selects_as_reference(random_tensor(*shape, dtype=dtype), budgets, segments[0])


def test_the_whole_clip_is_one_segment():
    scores = scores_with_ties(3, 500)
    chosen = select_tokens(scores, [77], torch.zeros(500, dtype=torch.int64))
    assert torch.equal(chosen.indices, select_tokens(scores, 77))
    assert chosen.count.tolist() == [77] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_keep_the_lower_index(dtype):
    scores = torch.tensor([[1.0, 0.0, -0.0, 2.0, -0.0, 0.0, 1.0]], dtype=dtype)
    assert select_tokens(scores, 5).tolist() == [[0, 1, 2, 3, 6]]
    assert select_tokens(scores.zero_(), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_largest_score(dtype):
    scores = torch.tensor([[1.0, NAN, float("inf"), -NAN, -float("inf")]], dtype=dtype)
    assert select_tokens(scores, 1).tolist() == [[1]]
    assert select_tokens(scores, 2).tolist() == [[1, 3]]
    assert select_tokens(scores, 3).tolist() == [[1, 2, 3]]
    assert select_tokens(scores, 4).tolist() == [[0, 1, 2, 3]]


def test_short_segments_are_padded():
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0], [3.0, 1.0, 2.0, 5.0]])
    segments = torch.tensor([[0, 1, 1, 7], [1, 1, 1, 1]])
    chosen = select_tokens(scores, [2, 1], segments)
    assert chosen.indices.tolist() == [[0, 2, -1], [3, -1, -1]]
    assert chosen.count.tolist() == [2, 1]


@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_selects_alike(layout):
    scores, segments = scores_with_ties(3, 90), torch.randint(0, 4, (3, 90))
    assert torch.equal(select_tokens(layouts(scores)[layout], 20), select_tokens(scores, 20))
    turned = select_tokens(layouts(scores)[layout], [9, 3, 0, 50], layouts(segments)[layout])
    assert torch.equal(turned.indices, select_tokens(scores, [9, 3, 0, 50], segments).indices)


def test_repeated_calls_and_thread_counts_agree():
    scores = scores_with_ties(1, 150_001)
    before, threads = select_tokens(scores, 70_000), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(select_tokens(scores, 70_000), before)
    finally:
        torch.set_num_threads(threads)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 200)),
    budgets=st.lists(st.integers(0, 60), max_size=6),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_any_selection(shape, budgets, dtype, layout, seed):
    scores = layouts(scores_with_ties(*shape, dtype=dtype, seed=seed))[layout]
    ids = torch.randint(-1, len(budgets) + 1, shape, generator=torch.Generator().manual_seed(seed))
    assert_selects_as_reference(scores, budgets, ids)
    assert_selects_as_reference(scores, min(sum(budgets), shape[1]))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "kept"), [(63, 21), (1, 5), (0, 4), (9, 0)])
def test_compact_matches_reference(length, kept, dtype):
    tokens, keep, *companions = clip(dtype, length, kept)
    extra = [companions[0].to(kind) for kind in (torch.int8, torch.int16, torch.int32)] + [tokens[..., :0], tokens]
    with poisoned():
        moved, others = compact(tokens, keep, *companions, *extra)
    wanted = reference.compact([tokens, *companions, *extra], keep)
    for actual, expected in zip((moved, *others), wanted, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_compact_pads_tokens_with_zeros_and_companions_with_minus_one():
    tokens, keep = torch.ones(1, 3, 2), torch.tensor([[2, -1]])
    moved, others = compact(
        tokens, keep, torch.tensor([[4, 5, 6]]), torch.tensor([[0.5, 1.0, 1.5]]), torch.ones(1, 3) > 0
    )
    assert moved.tolist() == [[[1, 1], [0, 0]]]
    assert [x.tolist() for x in others] == [[[6, -1]], [[1.5, -1]], [[True, False]]]


@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_compact_takes_any_layout(layout):
    tokens, keep, positions, *_ = clip()
    moved, (where,) = compact(layouts(tokens)[layout], layouts(keep)[layout], layouts(positions)[layout])
    assert torch.equal(moved, compact(tokens, keep).tokens)
    assert torch.equal(where, reference.compact([tokens, positions], keep)[1])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "kept"), [(63, 21), (5, 70), (0, 4), (9, 0)])
def test_compact_gradients(length, kept, dtype):
    tokens, keep, _, times, _ = clip(dtype, length, kept)
    with poisoned():
        actual = gradients("auto", tokens, keep, times)
    expected = gradients("reference", tokens, keep, times)
    assert_within_budget(actual, expected, gradients("reference", tokens.double(), keep, times))


@pytest.mark.usefixtures("native")
def test_gradcheck():
    tokens, keep, _, times, _ = clip(torch.float64, 6, 5)
    tokens, times = tokens.requires_grad_(), times.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: (compact(x, keep, t).tokens, *compact(x, keep, t)[1]), (tokens, times))


@pytest.mark.usefixtures("native")
def test_opcheck():
    scores, segments = scores_with_ties(2, 30), torch.randint(-1, 3, (2, 30))
    ops = torch.ops.vmemory
    torch.library.opcheck(ops.select_tokens.default, (scores, [4], None))
    torch.library.opcheck(ops.select_tokens.default, (scores, [4, 3, 9], segments))
    tokens, keep, *companions = clip()
    torch.library.opcheck(ops.compact.default, ([tokens, *companions], keep))
    torch.library.opcheck(ops.compact_backward.default, (compact(tokens, keep).tokens, keep, 63))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()

    def step(scores, segments, tokens, times):
        keep, count = select_tokens(scores, [3, 4], segments)
        few = select_tokens(scores, 5)
        return compact(tokens, keep, times), compact(tokens, few).tokens, count

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (40, 50):
        scores, segments = scores_with_ties(2, n), torch.arange(n) % 3
        tokens, times = random_tensor(2, n, 6).requires_grad_(), random_tensor(2, n, dtype=torch.float64)
        actual, expected = compiled(scores, segments, tokens, times), step(scores, segments, tokens, times)
        assert torch.equal(actual[0].tokens, expected[0].tokens)
        assert torch.equal(actual[0].companions[0], expected[0].companions[0])
        assert torch.equal(actual[2], expected[2])
        loss = [(x[0].tokens.square().sum() + x[1].sum()) for x in (actual, expected)]
        assert torch.equal(*(torch.autograd.grad(x, tokens)[0] for x in loss))


X = torch.ones(2, 5)
IDS = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: select_tokens([1.0], 1), TypeError, "scores: expected a tensor"),
        (lambda: select_tokens(X[0], 1), ValueError, r"scores: expected a tensor \[S, N\]"),
        (lambda: select_tokens(X.int(), 1), ValueError, "scores: .*int32"),
        (lambda: select_tokens(X, 6), ValueError, "budget: expected between 0 and 5, got 6"),
        (lambda: select_tokens(X, -1), ValueError, "budget: expected"),
        (lambda: select_tokens(X, [1]), TypeError, "budget: expected an int, got list"),
        (lambda: select_tokens(X, 1, IDS), TypeError, "budget: expected a list of ints with segments"),
        (lambda: select_tokens(X, [1, -1], IDS), ValueError, r"budget\[1\]: expected at least 0"),
        (lambda: select_tokens(X, [1] * 4097, IDS), ValueError, "budget: expected at most 4096 segments"),
        (lambda: select_tokens(X, [1], [0] * 5), TypeError, "segments: expected a tensor"),
        (lambda: select_tokens(X, [1], IDS[:4]), ValueError, r"segments: expected \[2, 5\] or \[5\], got shape \[4\]"),
        (lambda: select_tokens(X, [1], IDS.int()), ValueError, "segments: expected int64"),
        (lambda: compact(3, IDS[None]), TypeError, "tokens: expected a tensor"),
        (lambda: compact(X.int(), IDS.expand(2, 5)), ValueError, "tokens: .*int32"),
        (lambda: compact(X, X > 0), ValueError, "keep: expected int64 indices.*bool"),
        (lambda: compact(X, IDS[None]), ValueError, r"keep: expected 2 streams, got shape \[1, 5\]"),
        (lambda: compact(X, IDS), ValueError, r"keep: expected a tensor \[S, K\]"),
        (lambda: compact(X, IDS.expand(2, 5), X[:, :4]), ValueError, r"companions\[0\]: expected .* \[2, 5, ...\]"),
        (lambda: compact(X, IDS.expand(2, 5), X.byte()), ValueError, r"companions\[0\]: .*uint8"),
        (lambda: compact(X, IDS.expand(2, 5), None), TypeError, r"companions\[0\]: expected a tensor"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
