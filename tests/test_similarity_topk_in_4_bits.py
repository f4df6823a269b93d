"""Search in packed rows is search in the same values as int8; a range of time; a memory that is a file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairwise import types_in_turn
from tests.similarity import FLOATING, METRICS, SHAPES, assert_finds, filters, memory_with_ties
from vmemory.ops import quantize_slots, similarity_topk
from vmemory.reference import quantize_slots as packing
from vmemory.reference import similarity_topk as reference
from vmemory.testing import (
    A100_SHARED_BYTES,
    assert_within_budget,
    compile_triton,
    layouts,
    poisoned,
    python,
    random_tensor,
)

MODULE = "vmemory.kernels.similarity_topk"


def packed_memory(S: int, M: int, D: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows, their scales, and the same values in int8; the half byte that an odd D leaves is not zero."""
    packed, scale = quantize_slots(memory_with_ties(S, M, D, seed=seed), 4)
    if D % 2:
        packed[..., -1] |= 0x50
    return packed, scale, packing.unpack(packed, D)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), [*SHAPES, (1, 3, 90, 1, 4), (1, 2, 50, 31, 4), (1, 2, 9, 17, 4)])
def test_native_finds_what_it_finds_in_int8(S, Q, M, D, k, dtype, metric):
    query, (packed, scale, plain) = random_tensor(S, Q, D, dtype=dtype), packed_memory(S, M, D)
    for kwargs in ({}, filters(S, M)):
        with poisoned():
            found = similarity_topk(query, packed, k, metric=metric, scale=scale, **kwargs)
        expected = similarity_topk(query, plain, k, metric=metric, scale=scale, **kwargs)
        assert all(map(torch.equal, found, expected))
        low, known = (
            reference.similarity_topk(query, rows, k, metric=metric, scale=scale, **kwargs) for rows in (packed, plain)
        )
        assert all(map(torch.equal, low, known))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_gradient_of_the_query(dtype, metric):
    query, (packed, scale, plain) = random_tensor(2, 5, 25, dtype=dtype), packed_memory(2, 80, 25)
    values, indices = similarity_topk(query, packed, 9, metric=metric, scale=scale)
    low, wide = (
        reference.similarity_topk_backward(2 * v, v, indices, q, plain, scale, metric, True, False)[0]
        for v, q in ((values, query), (values.double(), query.double()))
    )
    for rows in (packed, plain):
        leaf = query.clone().requires_grad_()
        found = similarity_topk(leaf, rows, 9, metric=metric, scale=scale)
        assert_within_budget(torch.autograd.grad(found.values.square().sum(), leaf)[0], low, wide)
    arguments = values, values, indices, query, packed, scale, metric, True, False
    expected = reference.similarity_topk_backward(*arguments[:4], plain, *arguments[5:])[0]
    assert torch.equal(reference.similarity_topk_backward(*arguments)[0], expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_finds_alike(layout):
    query, (packed, scale, _) = random_tensor(2, 9, 21), packed_memory(2, 90, 21)
    found = similarity_topk(layouts(query)[layout], layouts(packed)[layout], 8, scale=layouts(scale)[layout])
    assert all(map(torch.equal, found, similarity_topk(query, packed, 8, scale=scale)))


@pytest.mark.usefixtures("native")
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 150), st.integers(0, 70)),
    k=st.integers(1, 60),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(FLOATING),
)
@settings(max_examples=60, deadline=None)
def test_any_search(shape, k, metric, dtype):
    S, Q, M, D = shape
    query, (packed, scale, plain) = random_tensor(S, Q, D, dtype=dtype), packed_memory(S, M, D)
    with poisoned():
        found = similarity_topk(query, packed, k, metric=metric, scale=scale)
    assert all(map(torch.equal, found, similarity_topk(query, plain, k, metric=metric, scale=scale)))


@pytest.mark.usefixtures("native")
def test_opcheck_and_one_graph():
    query, (packed, scale, _) = random_tensor(2, 3, 21), packed_memory(2, 40, 21)
    forward = torch.ops.vmemory.similarity_topk.default
    torch.library.opcheck(forward, (query, packed, None, None, scale, None, 4, "cosine"))
    torch._dynamo.reset()
    compiled = torch.compile(similarity_topk, fullgraph=True, backend="aot_eager")
    assert all(
        map(torch.equal, compiled(query, packed, 4, scale=scale), similarity_topk(query, packed, 4, scale=scale))
    )


def test_bad_arguments():
    query, (packed, scale, _) = random_tensor(2, 3, 21), packed_memory(2, 40, 21)
    with pytest.raises(ValueError, match=r"query: expected \[2, Q, 21 or 22\] to fit memory \[2, 40, 11\]"):
        similarity_topk(query[..., :20], packed, 4, scale=scale)
    with pytest.raises(ValueError, match="scale: expected one with int8 or uint8 memory"):
        similarity_topk(query, packed, 4)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_range_of_time_is_a_filter(impl):
    query, memory = random_tensor(1, 2, 16), random_tensor(1, 100, 16)
    time = torch.arange(100, dtype=torch.float64)[None] / 2
    time[0, 30] = float("nan")
    since, until = 10.0, 20.0
    where = (time >= since) & (time < until)
    found = similarity_topk(query, memory, 19, where=where, impl=impl)
    assert sorted(found.indices[0, 0].tolist()) == [*range(20, 30), *range(31, 40)]
    inside = similarity_topk(query, memory[:, 20:30], 5, impl=impl)
    ten = similarity_topk(query, memory, 5, where=(time >= 10) & (time < 15), impl=impl)
    assert torch.equal(ten.indices, inside.indices + 20)
    assert torch.equal(ten.values, inside.values)


ROWS, WIDTH = 200_000, 384

SCAN = """
import re, sys, threading, torch
from pathlib import Path
from vmemory.ops import similarity_topk

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

rows, width, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
memory = torch.from_file(path, shared=True, size=rows * width, dtype=torch.float32).view(1, rows, width)
query = torch.zeros(1, 4, width)
query[0, :, 7] = 1
similarity_topk(query, torch.ones(1, 5000, width), 3)
before, most, done = kilobytes("RssAnon"), 0, threading.Event()

def watch():
    global most
    while not done.wait(0.001):
        most = max(most, kilobytes("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(3):
    found = similarity_topk(query, memory, 3, metric="dot")
done.set()
watcher.join()
print(found.indices[0, 0].tolist(), (max(most, kilobytes("RssAnon")) - before) * 1024)
"""


@pytest.mark.usefixtures("native")
def test_a_mapped_file_is_searched_without_a_copy(tmp_path):
    path, expected = tmp_path / "slots.f32", [123_456, 7, ROWS - 1]
    with path.open("wb") as file:
        # a file with holes takes no space on the disk, but as many pages of a mapping
        file.truncate(ROWS * WIDTH * 4)
    slots = torch.from_file(str(path), shared=True, size=ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    for rank, slot in enumerate(expected):
        slots[slot, 7] = 3.0 - rank
    del slots
    code = f"import sys; sys.argv[1:] = ['{ROWS}', '{WIDTH}', {str(path)!r}]\n{SCAN}"
    indices, _, grown = python(code).strip().rpartition(" ")
    assert indices == str(expected)
    # pages of the file are the page cache's, which gives them back; what the process itself holds does not follow it
    assert int(grown) < ROWS * WIDTH * 4 / 20


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("S", "Q", "M", "D", "k", "dtype"),
    [(*case, dtype) for case, dtype in types_in_turn([(2, 3, 150, 21, 5), (1, 18, 70, 40, 3), (1, 2, 5, 0, 3)])],
)
def test_triton_matches_reference(triton, S, Q, M, D, k, dtype, metric):
    query, (packed, scale, plain) = random_tensor(S, Q, D, dtype=dtype), packed_memory(S, M, D)
    chosen = filters(S, M)
    arguments = query, packed, chosen["count"], chosen["where"], scale, None, k, metric
    found = triton(MODULE, "similarity_topk", *arguments)
    assert_finds(found, query, plain, k, metric, scale=scale, **chosen)


@pytest.mark.parametrize("metric", METRICS)
def test_triton_backward(triton, metric):
    query, (packed, scale, plain) = random_tensor(2, 3, 21), packed_memory(2, 50, 21)
    values, indices = reference.similarity_topk(query, plain, 5, metric=metric, scale=scale)
    weight = random_tensor(*values.shape, seed=7)
    last = scale, metric, True, False
    actual = triton(MODULE, "similarity_topk_backward", weight, values, indices, query, packed, *last)
    expected = reference.similarity_topk_backward(weight, values, indices, query, plain, *last)
    wide = [x.double() for x in (weight, values, query)]
    truth = reference.similarity_topk_backward(*wide[:2], indices, wide[2], plain, *last)
    assert_within_budget(actual, expected, truth)


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["groups", "rows", "share", "query_bwd"])
@pytest.mark.parametrize(
    ("query", "block_q", "block_d"), [("fp32", 16, 16), ("fp32", 64, 16), ("bf16", 16, 32), ("bf16", 64, 32)]
)
def test_triton_compiles(query, block_q, block_d, name, arch):
    from vmemory.kernels import _similarity_topk_backward as backward
    from vmemory.kernels import similarity_topk as kernels

    signature = {"memory": "*u8", "count": "*i64", "where": "*i1"} | dict.fromkeys(("query", "out"), f"*{query}")
    signature |= dict.fromkeys(("query_norm", "scale", "grad", "values", "share"), "*fp32")
    signature |= dict.fromkeys(("best", "chosen", "keys", "indices"), "*i64")
    signature |= dict.fromkeys(("Q", "M", "D", "K", "TILES", "QUERY_BLOCKS", "ENTRIES"), "i32")
    scores = name in ("groups", "rows")
    constants = {"HAS_SCALE": True, "BLOCK_D": block_d if scores else 512}
    if scores:
        constants |= {"COSINE": True, "HAS_COUNT": True, "HAS_WHERE": True, "GROUP": 16, "BLOCK_Q": block_q}
        constants |= {"BLOCK_M": 64} | ({"KP": 16} if name == "rows" else {})
    else:
        constants |= {"COSINE": True} if name == "share" else {"BLOCK_K": 16}
    kernel = getattr(kernels if scores else backward, f"_similarity_topk_{name}_kernel")
    options = {"num_warps": 8, "num_stages": 2} if scores else {}
    compiled = compile_triton(kernel, signature, constants, arch, **options)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING[1:])
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), SHAPES)
def test_cuda_matches_reference(S, Q, M, D, k, dtype, metric):
    packed, scale, plain = (x.cuda() for x in packed_memory(S, M, D))
    query = random_tensor(S, Q, D, dtype=dtype, device="cuda")
    with poisoned():
        found = similarity_topk(query, packed, k, metric=metric, scale=scale)
    assert_finds(found, query, plain, k, metric, scale=scale)
    with pytest.raises(RuntimeError, match="no native CUDA kernel"):
        similarity_topk(query, packed, k, metric=metric, scale=scale, impl="native")
