from __future__ import annotations

import pytest
import torch

from tests.pairwise import types_in_turn
from tests.similarity import FLOATING, METRICS, SHAPES, assert_finds, filters, int8_memory, memory_with_ties
from vmemory.ops.similarity_topk import similarity_topk
from vmemory.reference import similarity_topk as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, poisoned, random_tensor

MODULE = "vmemory.kernels.similarity_topk"
# small enough to be run on the CPU: S, Q, M, D, k
SMALL = [(2, 3, 300, 20, 5), (1, 1, 90, 8, 100), (1, 2, 700, 8, 70), (2, 2, 5, 0, 3), (1, 2, 0, 4, 2), (0, 1, 9, 4, 2)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("S", "Q", "M", "D", "k", "dtype"), [(*case, dtype) for case, dtype in types_in_turn(SMALL)])
def test_triton_matches_reference(triton, S, Q, M, D, k, dtype, metric):
    query, memory = random_tensor(S, Q, D, dtype=dtype), memory_with_ties(S, M, D, dtype)
    memory[:, 9:10] = float("nan")
    chosen = filters(S, M)
    found = triton(MODULE, "similarity_topk", query, memory, chosen["count"], chosen["where"], None, None, k, metric)
    assert_finds(found, query, memory, k, metric, **chosen)


@pytest.mark.parametrize("metric", METRICS)
def test_triton_matches_reference_many_queries(triton, metric):
    query, memory = random_tensor(1, 18, 16), memory_with_ties(1, 70, 16)
    found = triton(MODULE, "similarity_topk", query, memory, None, None, None, None, 3, metric)
    assert_finds(found, query, memory, 3, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_matches_reference_in_int8(triton, dtype, metric):
    query, (memory, scale) = random_tensor(1, 2, 24, dtype=dtype), int8_memory(1, 130, 24)
    found = triton(MODULE, "similarity_topk", query, memory, None, None, scale, None, 6, metric)
    assert_finds(found, query, memory, 6, metric, scale=scale)


def search_to_differentiate(S, Q, M, D, k, dtype, metric, in_int8):
    query, scale, rows = random_tensor(S, Q, D, dtype=dtype), None, memory_with_ties(S, M, D, dtype)
    if in_int8:
        rows, scale = int8_memory(S, M, D)
    values, indices = reference.similarity_topk(query, rows, k, **filters(S, M), metric=metric, scale=scale)
    weight = torch.where(indices < 0, 0, random_tensor(*values.shape, seed=7).to(values.dtype))
    last = scale, metric, True, not in_int8
    plain = weight, values, indices, query, rows, *last
    wide = [x.double() for x in (weight, values, query)]
    rows = rows if in_int8 else rows.double()
    return plain, (*wide[:2], indices, wide[2], rows, *last)


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("S", "Q", "M", "D", "k", "dtype"), [(*case, dtype) for case, dtype in types_in_turn(SMALL)])
def test_triton_backward(triton, S, Q, M, D, k, dtype, metric, in_int8):
    plain, wide = search_to_differentiate(S, Q, M, D, k, dtype, metric, in_int8)
    actual = triton(MODULE, "similarity_topk_backward", *plain)
    assert_within_budget(actual, reference.similarity_topk_backward(*plain), reference.similarity_topk_backward(*wide))


POINTERS = {"query": "*{q}", "query_norm": "*fp32", "memory": "*{m}", "count": "*i64", "where": "*i1", "scale": "*fp32"}
SCALARS = dict.fromkeys(("Q", "M", "D", "K", "TILES", "QUERY_BLOCKS", "ENTRIES", "N", "PIECES", "PIECE"), "i32")


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["groups", "rows"])
@pytest.mark.parametrize(
    ("query", "memory", "block_q", "block_d"),
    [(query, memory, block_q, 16 if query == "fp32" else 64)
     for query, memory in (("fp32", "fp32"), ("fp32", "i8"), ("bf16", "bf16"), ("bf16", "i8"), ("fp16", "i8"))
     for block_q in (16, 64)],
)  # fmt: skip
def test_triton_scores_compile(query, memory, block_q, block_d, name, arch):
    from vmemory.kernels import similarity_topk as kernels

    signature = {key: kind.format(q=query, m=memory) for key, kind in POINTERS.items()} | SCALARS
    signature |= dict.fromkeys(("best", "chosen", "keys"), "*i64")
    constants = {"COSINE": True, "HAS_COUNT": True, "HAS_WHERE": True, "HAS_SCALE": memory == "i8", "GROUP": 16,
                 "BLOCK_Q": block_q, "BLOCK_M": 64, "BLOCK_D": block_d}  # fmt: skip
    kernel = getattr(kernels, f"_similarity_topk_{name}_kernel")
    constants |= {"KP": 16} if name == "rows" else {}
    compiled = compile_triton(kernel, signature, constants, arch, num_warps=8, num_stages=2)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["choose-16", "choose-256", "choose-1024", "result", "share", "query", "memory"])
def test_triton_compiles(name, arch):
    from vmemory.kernels import _similarity_topk_backward as backward
    from vmemory.kernels import similarity_topk as kernels

    signature = {key: kind.format(q="bf16", m="bf16") for key, kind in POINTERS.items()} | SCALARS
    signature |= dict.fromkeys(("chosen", "keys", "indices", "rows", "order"), "*i64")
    signature |= dict.fromkeys(("grad", "values", "share"), "*fp32") | {"out": "*bf16"}
    choose, scaled = kernels._similarity_topk_choose_kernel, {"HAS_SCALE": True, "BLOCK_D": 512}
    kernel, constants = {
        "choose-16": (choose, {"KP": 16, "BLOCK": 256}),
        "choose-256": (choose, {"KP": 256, "BLOCK": 256}),
        "choose-1024": (choose, {"KP": 1024, "BLOCK": 1024}),
        "result": (kernels._similarity_topk_result_kernel, {"KP": 1024}),
        "share": (backward._similarity_topk_share_kernel, scaled | {"COSINE": True}),
        "query": (backward._similarity_topk_query_bwd_kernel, scaled | {"BLOCK_K": 16}),
        "memory": (backward._similarity_topk_memory_bwd_kernel, {"BLOCK_D": 512}),
    }[name]
    options = {"maxnreg": 168} if kernel is choose else {}
    compiled = compile_triton(kernel, signature, constants, arch, **options)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [*FLOATING[1:], torch.int8])
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), SHAPES)
def test_cuda_matches_reference(S, Q, M, D, k, dtype, metric, impl):
    query = random_tensor(S, Q, D, dtype=torch.float32 if dtype == torch.int8 else dtype, device="cuda")
    rows, scale = int8_memory(S, M, D) if dtype == torch.int8 else (memory_with_ties(S, M, D, dtype), None)
    rows, scale = rows.cuda(), None if scale is None else scale.cuda()
    for kwargs in ({}, {name: x.cuda() for name, x in filters(S, M).items()}):
        with poisoned():
            found = similarity_topk(query, rows, k, metric=metric, scale=scale, impl=impl, **kwargs)
        assert_finds(found, query, rows, k, metric, scale=scale, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATING[1:])
@pytest.mark.parametrize(("S", "Q", "M", "D", "k"), SHAPES)
def test_cuda_gradients(S, Q, M, D, k, dtype, metric, in_int8):
    plain, wide = search_to_differentiate(S, Q, M, D, k, dtype, metric, in_int8)
    with poisoned():
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in plain]
        actual = torch.ops.vmemory_triton.similarity_topk_backward(*moved)
    assert_within_budget(actual, reference.similarity_topk_backward(*plain), reference.similarity_topk_backward(*wide))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_cuda_search_is_captured_and_does_not_wait(impl):
    query, memory = random_tensor(1, 8, 64, device="cuda"), random_tensor(1, 5000, 64, device="cuda")
    expected = similarity_topk(query, memory, 9, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        similarity_topk(query, memory, 9, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, source = torch.cuda.CUDAGraph(), torch.zeros_like(memory)
    with torch.cuda.graph(graph):
        found = similarity_topk(query, source, 9, impl=impl)
    source.copy_(memory)
    graph.replay()
    assert all(map(torch.equal, found, expected))
