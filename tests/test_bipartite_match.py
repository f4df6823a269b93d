from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import types_in_turn
from vmemory.ops import MergePlan, bipartite_match, merge_source
from vmemory.reference import bipartite_match as reference
from vmemory.testing import A100_SHARED_BYTES, compile_triton, layouts, poisoned, python, random_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.bipartite_match"
CASES = [
    ((2, 63, 17), 20, {}),
    ((1, 1000, 64), 300, {"protected": 1}),
    ((2, 199, 80), 1000, {"protected": 2}),
    ((3, 50, 16), 10, {"cls": 3}),
    ((6, 33, 24), 30, {"cls": 1, "groups": 3}),
    ((4, 20, 300), 15, {"groups": 2}),
    ((1, 400, 1031), 100, {}),
]
EDGES = [
    ((2, 9, 0), 3, {}), ((0, 9, 4), 3, {}), ((2, 0, 4), 3, {}), ((2, 1, 4), 3, {}), ((2, 2, 4), 3, {"protected": 1}),
    ((2, 2, 4), 3, {}), ((2, 3, 4), 1, {"cls": 1}), ((2, 4, 4), 0, {"cls": 4}), ((4, 3, 4), 0, {"cls": 2, "groups": 4}),
    ((2, 5, 4), 9, {"protected": 2}), ((4, 1, 4), 2, {"groups": 4}), ((0, 0, 0), 0, {"groups": 5}),
]  # fmt: skip


def tied(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, special: bool = True) -> Tensor:
    """Rows along few directions whose products and norms are exact in every dtype, with zero and NaN rows."""
    draw = torch.Generator().manual_seed(seed)
    D = shape[-1]
    if D < 4:
        return torch.randint(0, 2, shape, generator=draw).to(dtype)
    directions = torch.zeros(7, D, dtype=torch.float64)
    for k, (at, length) in enumerate([(0, 1), (1, 1), (3, 1), (0, 2), (0, 4)]):
        directions[k, at : at + length] = 1 if length < 4 else torch.tensor([1.0, 1, -1, 1])
    # norms are powers of two or the row is alone on its line
    directions[3, 1] = 0
    scale = 2.0 ** torch.randint(-2, 3, shape[:-1], generator=draw)
    kinds = torch.randint(0, 6 if special else 5, shape[:-1], generator=draw)
    rows = directions[kinds] * scale[..., None]
    if special:
        rows[torch.rand(shape[:-1], generator=draw) < 0.02] = float("nan")
    return rows.to(dtype)


def same(actual: MergePlan | tuple[Tensor, ...], expected: MergePlan) -> None:
    for name, x, y in zip(MergePlan._fields, actual[:3], expected[:3], strict=False):
        assert torch.equal(x.cpu(), y.cpu()), name


def settled(metric: Tensor, r: int, **options) -> bool:
    """Whether every choice has a margin beyond rounding in float32."""
    cls, groups = options.get("cls"), options.get("groups", 1)
    front = groups * cls if cls is not None else options.get("protected", 0)
    scores = reference.match_scores(metric.double(), front, cls or 0, groups)
    best = scores.sort(-1, descending=True).values
    edge = best[..., 0].sort(-1, descending=True).values
    r = min(r, (groups * metric.shape[1] - front) // 2)
    margin = (best[..., 0] - best[..., 1]).min() if best.shape[-1] > 1 else torch.tensor(1.0)
    return bool(margin > 1e-6 and (r in (0, edge.shape[1]) or (edge[:, r - 1] - edge[:, r]).min() > 1e-6))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "r", "options"), CASES)
def test_native_matches_reference(shape, r, options, dtype):
    metric = random_tensor(*shape, dtype=dtype)
    assert settled(metric, r, **options)
    for x in (metric, tied(*shape, dtype=dtype)):
        with poisoned():
            actual = bipartite_match(x, r, **options)
        same(actual, bipartite_match(x, r, **options, impl="reference"))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "r", "options"), EDGES)
def test_edges(shape, r, options, dtype):
    for metric in (torch.ones(shape, dtype=dtype), tied(*shape, dtype=dtype)):
        with poisoned():
            actual = bipartite_match(metric, r, **options)
        same(actual, bipartite_match(metric, r, **options, impl="reference"))


def test_the_plan_of_a_small_sequence():
    # rows 0 to 6: 2 is like 5, 4 is like 3, 6 is like nothing
    metric = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [2, 2, 0.1], [0, 0, 3], [-1, -1, -1]]])
    plan = bipartite_match(metric, 2, 1)
    assert plan.place.tolist() == [[0, 2, 4, 3, 3, 4, 1]]
    assert plan.order.tolist() == [[0, 6, 1, 3, 4, 5, 2]]
    assert plan.start.tolist() == [[0, 1, 2, 3, 5, 7]]
    assert plan.kept.tolist() == [[0, 6, 1, 3, 5]]
    assert plan.groups == 1


def test_nothing_to_merge_keeps_the_sequence():
    metric = random_tensor(4, 6, 8)
    for plan in (bipartite_match(metric, 0), bipartite_match(metric, 0, 2), bipartite_match(metric, 0, cls=1)):
        assert plan.order.tolist() == [list(range(6))] * 4
    grouped = bipartite_match(metric, 0, cls=2, groups=2)
    assert grouped.order.tolist() == [[0, 1, 6, 7, 2, 3, 4, 5, 8, 9, 10, 11]] * 2


def test_r_is_clamped_without_cls():
    for rows in range(12):
        for protected in range(3):
            plan = bipartite_match(random_tensor(1, rows, 4), 100, protected)
            assert plan.start.shape[1] - 1 == rows - max(0, rows - protected) // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_score_equally_wherever_they_lie(dtype):
    """Of copies of a row the first is the partner, and of copies that look for one the first ones merge."""
    kinds = torch.randint(0, 40, (1, 1501), generator=torch.Generator().manual_seed(3))
    metric = random_tensor(40, 57, dtype=dtype)[kinds]
    plan = bipartite_match(metric, 300)
    evens, odds = kinds[0, ::2].tolist(), kinds[0, 1::2].tolist()
    merged = (plan.place[0, ::2] >= 751 - 300).tolist()
    left: set[int] = set()
    for i, kind in enumerate(evens):
        if merged[i]:
            assert plan.place[0, 2 * i] == 751 - 300 + odds.index(kind)
            assert kind not in left
        else:
            left.add(kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_score_zero_and_nan_is_the_largest(dtype):
    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 0], [1, 1], [-1, 0], [0, 1]]], dtype=dtype)
    assert bipartite_match(metric, 1).place.tolist() == [[2, 2, 0, 3, 1, 4]]
    assert bipartite_match(metric, 2).place.tolist() == [[1, 1, 1, 2, 0, 3]]
    metric[0, 4] = float("nan")
    assert bipartite_match(metric, 1).place.tolist() == [[0, 2, 1, 3, 2, 4]]
    metric[0, 3] = float("nan")
    assert bipartite_match(metric, 2).place.tolist() == [[2, 1, 2, 2, 0, 3]]


@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_matches_alike(layout):
    metric = random_tensor(4, 51, 19)
    for options in ({}, {"cls": 1, "groups": 2}):
        same(bipartite_match(layouts(metric)[layout], 12, **options), bipartite_match(metric, 12, **options))


def test_repeated_calls_and_thread_counts_agree():
    threads = torch.get_num_threads()
    for metric in (random_tensor(1, 1301, 65), tied(3, 700, 30), random_tensor(40, 50, 64)):
        before = bipartite_match(metric, 200)
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                same(bipartite_match(metric, 200), before)
        finally:
            torch.set_num_threads(threads)


@given(
    clips=st.integers(0, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(0, 40),
    channels=st.integers(0, 40),
    kept=st.one_of(st.tuples(st.just("protected"), st.integers(0, 2)), st.tuples(st.just("cls"), st.integers(0, 3))),
    part=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_any_match(clips, groups, tokens, channels, kept, part, dtype, layout, seed):
    name, count = kept
    groups = 1 if name == "protected" and count else groups
    count = min(count, tokens) if name == "cls" else count
    rows, front = groups * tokens, groups * count if name == "cls" else 0
    evens, odds = (rows + 1) // 2 - (front + 1) // 2, rows // 2 - front // 2
    r = int(part * (evens if odds else 0))
    metric = layouts(tied(clips * groups, tokens, channels, dtype=dtype, seed=seed))[layout]
    with poisoned():
        plan = bipartite_match(metric, r, groups=groups, **{name: count})
    same(plan, bipartite_match(metric, r, groups=groups, **{name: count}, impl="reference"))
    assert torch.equal(plan.order.sort(1).values, torch.arange(rows).expand(clips, -1))
    token = torch.arange(plan.start.shape[1] - 1).repeat(clips, 1)
    assert torch.equal(plan.place.gather(1, plan.kept), token)
    spread = [torch.repeat_interleave(row.diff()) for row in plan.start]
    assert torch.equal(plan.place.gather(1, plan.order), torch.stack(spread) if clips else plan.place)


@pytest.mark.usefixtures("native")
def test_workspace_grows_with_the_rows_only():
    """The scores of all pairs of these rows would take 900 MB."""
    code = """
import resource, torch
from vmemory.ops import bipartite_match
metric = torch.randn(1, 30_000, 4)
bipartite_match(metric[:, :100], 20)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bipartite_match(metric, 9_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024)
"""
    assert int(python(code)) < 30


@pytest.mark.usefixtures("native")
def test_opcheck():
    ops = torch.ops.vmemory
    torch.library.opcheck(ops.bipartite_match.default, (random_tensor(2, 30, 8), 7, 1, 0, 1))
    torch.library.opcheck(ops.bipartite_match.default, (random_tensor(6, 10, 8), 5, 3, 1, 3))


X = torch.ones(4, 6, 3)
PLAN = bipartite_match(X, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bipartite_match([1.0], 1), TypeError, "metric: expected a tensor"),
        (lambda: bipartite_match(X[0], 1), ValueError, r"metric: expected a tensor \[B, N, D\]"),
        (lambda: bipartite_match(X.int(), 1), ValueError, "metric: .*int32"),
        (lambda: bipartite_match(X, 1.0), TypeError, "r: expected an int"),
        (lambda: bipartite_match(X, -1), ValueError, "r: expected at least 0"),
        (lambda: bipartite_match(X, 1, 3), ValueError, "protected: expected between 0 and 2"),
        (lambda: bipartite_match(X, 1, 1, cls=1), ValueError, "protected: expected 0 with cls"),
        (lambda: bipartite_match(X, 1, 1, groups=2), ValueError, "protected: expected 0 with groups"),
        (lambda: bipartite_match(X, 1, groups=3), ValueError, "groups: expected a divisor of the batch size 4, got 3"),
        (lambda: bipartite_match(X, 1, groups=0), ValueError, "groups: expected at least 1"),
        (lambda: bipartite_match(X, 1, cls=7), ValueError, "cls: expected between 0 and 6"),
        (lambda: bipartite_match(X, 3, cls=1), ValueError, "r: expected between 0 and 2, .* got 3"),
        (lambda: bipartite_match(X, 1, cls=5), ValueError, "r: expected between 0 and 0"),
        (lambda: merge_source((PLAN.place,)), TypeError, "plan: expected a MergePlan"),
        (lambda: merge_source(PLAN, X), ValueError, r"source: expected a tensor \[B, N0\]"),
        (lambda: merge_source(PLAN, PLAN.place.int()), ValueError, r"source: expected int64 \[4, N0\]"),
        (lambda: merge_source(PLAN, PLAN.place[:2]), ValueError, r"source: expected int64 \[4, N0\]"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def arguments(metric: Tensor, r: int, protected: int = 0, cls: int | None = None, groups: int = 1) -> tuple:
    rows = groups * metric.shape[1]
    r = min(r, max(0, rows - protected) // 2) if cls is None else r
    return metric, r, rows if r == 0 else protected if cls is None else groups * cls, cls or 0, groups


@pytest.mark.parametrize(
    ("shape", "r", "options", "dtype"),
    [(*case, dtype) for case, dtype in types_in_turn([*CASES[:1], *CASES[3:6], ((1, 300, 40), 70, {}), *EDGES])],
)
def test_triton_matches(triton, shape, r, options, dtype):
    for metric in (random_tensor(*shape, dtype=dtype), tied(*shape, dtype=dtype)):
        actual = triton(MODULE, "bipartite_match", *arguments(metric, r, **options))
        same(actual, bipartite_match(metric, r, **options, impl="reference"))


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("norm", "bf16"), ("match", "fp32"), ("match", "fp16"), ("match", "bf16"), ("rank", "bf16"), ("places", "bf16")],
)
def test_triton_compiles_ahead_of_time(name, dtype, arch):
    from vmemory.kernels import bipartite_match as kernels

    sizes = ("TOKENS", "CLS", "GROUPS", "FRONT", "EVENS", "ODDS", "D", "TILES", "PARTS", "PART", "R", "ROWS")
    tensors = {"metric": f"*{dtype}", "inverse": "*fp32", "partners": "*i32"}
    tensors |= dict.fromkeys(("found", "places", "order", "starts"), "*i64")
    kernel, constants, warps = {
        "norm": (kernels._inverse_norm_kernel, {"BLOCK_R": 2, "BLOCK_D": 1024}, 4),
        "match": (
            kernels._bipartite_match_kernel,
            {"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_D": 16 if dtype == "fp32" else 32}, 8,
        ),
        "rank": (kernels._merge_rank_kernel, {"BLOCK_I": 16, "BLOCK_N": 256}, 4),
        "places": (kernels._merge_places_kernel, {"BLOCK_P": 16, "BLOCK_N": 256}, 4),
    }[name]  # fmt: skip
    compiled = compile_triton(kernel, tensors | dict.fromkeys(sizes, "i32"), constants, arch, num_warps=warps)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("shape", "r", "options"), [*CASES, ((2, 5000, 128), 1700, {}), *EDGES])
def test_cuda_matches_reference(shape, r, options, dtype):
    for metric in (random_tensor(*shape, dtype=dtype, device="cuda"), tied(*shape, dtype=dtype).cuda()):
        with poisoned():
            actual = bipartite_match(metric, r, **options, impl="triton")
        same(actual, bipartite_match(metric.cpu(), r, **options, impl="reference"))
