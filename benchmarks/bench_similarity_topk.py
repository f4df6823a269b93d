"""Time exact search against faiss, and against a matrix product with torch.topk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Rotation
from vmemory.ops import dequantize_slots, quantize_slots, similarity_topk
from vmemory.testing import random_tensor

SLOTS, CHANNELS, K = 100_000, 384, 10


def product_and_topk(query: Tensor, memory: Tensor) -> Tensor:
    return (query @ memory.transpose(1, 2)).topk(K).indices


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def words(queries: int) -> str:
    return f"{queries} queries" if queries > 1 else "1 query"


def faiss_search(query: Tensor, memories: Rotation) -> Callable[[Tensor], Tensor]:
    """Return a faiss search of the next copy of the memory, in faiss's fastest setting; its argument is unused."""
    # faiss's OpenBLAS takes newer processors for a Pentium 4
    core = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    if core:
        os.environ.setdefault("OPENBLAS_CORETYPE", core)
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    # use a matrix product from two queries on: the default threshold is many thousands, and is three times slower
    faiss.cvar.distance_compute_blas_threshold = 2
    indexes = []
    for memory in memories:
        indexes.append(faiss.IndexFlatIP(CHANNELS))
        indexes[-1].add(memory[0].numpy())
    turn = itertools.cycle(indexes)
    return lambda _: torch.from_numpy(next(turn).search(query[0].numpy(), K)[1])[None]


@pytest.mark.benchmark(group=f"similarity_topk: {SLOTS:,} × {CHANNELS} float32, k = {K}, dot product")
@pytest.mark.parametrize("queries", [1, 8, 64])
def test_search(measure, device, queries):
    query, memory = random_tensor(1, queries, CHANNELS, device=device), random_tensor(1, SLOTS, CHANNELS, device=device)
    found = similarity_topk(query, memory, K, metric="dot").indices
    assert torch.equal(found, product_and_topk(query, memory))
    torch._dynamo.reset()
    compiled = torch.compile(product_and_topk, dynamic=False)
    others = {
        "matmul_and_topk": lambda rows: product_and_topk(query, rows),
        "compile": lambda rows: compiled(query, rows),
    }
    memories = Rotation(memory)
    if device == "cpu":
        others["faiss"] = faiss_search(query, memories)
        assert torch.equal(others["faiss"](memory), found)
    measure(
        words(queries),
        lambda rows: similarity_topk(query, rows, K, metric="dot"),
        memories,
        # the memory is read once; the result is negligible
        memory.numel() * memory.element_size(),
        2 * queries * memory.numel(),
        **others,
    )


@pytest.mark.benchmark(group=f"similarity_topk: {SLOTS:,} × {CHANNELS} float32, k = {K}, cosine")
@pytest.mark.parametrize("norms", ["norms kept", "norms summed"])
@pytest.mark.parametrize("queries", [1, 64])
def test_search_by_cosine(measure, device, queries, norms):
    query, memory = random_tensor(1, queries, CHANNELS, device=device), random_tensor(1, SLOTS, CHANNELS, device=device)
    norm = memory.norm(dim=-1) if norms == "norms kept" else None
    units = Rotation(unit(memory))
    assert torch.equal(similarity_topk(query, memory, K, norm=norm).indices, product_and_topk(unit(query), units()))
    measure(
        f"{words(queries)}, {norms}",
        lambda rows: similarity_topk(query, rows, K, norm=norm),
        Rotation(memory),
        memory.numel() * memory.element_size(),
        2 * queries * memory.numel(),
        dot=lambda rows: similarity_topk(query, rows, K, metric="dot"),
        # the peer's memory is stored normalised
        matmul_and_topk=lambda _: product_and_topk(unit(query), units()),
    )


@pytest.mark.benchmark(group=f"similarity_topk: {SLOTS:,} × {CHANNELS} float32, k = {K}, a filter")
@pytest.mark.parametrize("searched", [1.0, 0.5])
@pytest.mark.parametrize("queries", [1, 64])
def test_search_with_a_filter(measure, device, queries, searched):
    query, memory = random_tensor(1, queries, CHANNELS, device=device), random_tensor(1, SLOTS, CHANNELS, device=device)
    where = torch.rand(1, SLOTS, generator=torch.Generator().manual_seed(0)).to(device) < searched

    def filtered(rows: Tensor) -> Tensor:
        return (query @ rows.transpose(1, 2)).masked_fill(~where[:, None], -torch.inf).topk(K).indices

    assert torch.equal(similarity_topk(query, memory, K, metric="dot", where=where).indices, filtered(memory))
    measure(
        f"{words(queries)}, {searched:.0%} searched",
        lambda rows: similarity_topk(query, rows, K, metric="dot", where=where),
        Rotation(memory),
        memory.numel() * memory.element_size() * searched,
        2 * queries * memory.numel() * searched,
        unfiltered=lambda rows: similarity_topk(query, rows, K, metric="dot"),
        matmul_and_topk=filtered,
    )


@pytest.mark.benchmark(group=f"similarity_topk: 1,000,000 × {CHANNELS} float32, k = {K}, dot product")
@pytest.mark.parametrize("queries", [1, 8])
def test_search_of_a_million(measure, device, queries):
    query, memory = random_tensor(1, queries, CHANNELS, device=device), torch.empty(1, 10 * SLOTS, CHANNELS)
    memory = memory.to(device).uniform_(-1, 1, generator=torch.Generator(device).manual_seed(0))
    assert torch.equal(similarity_topk(query, memory, K, metric="dot").indices, product_and_topk(query, memory))
    measure(
        f"{words(queries)}, a million rows",
        lambda rows: similarity_topk(query, rows, K, metric="dot"),
        Rotation(memory),
        memory.numel() * memory.element_size(),
        2 * queries * memory.numel(),
        matmul_and_topk=lambda rows: product_and_topk(query, rows),
    )


@pytest.mark.benchmark(group=f"similarity_topk: {SLOTS:,} × {CHANNELS} in 8 and 4 bits, k = {K}, dot product")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("queries", [1, 8, 64])
def test_search_in_few_bits(measure, device, queries, bits):
    query, wide = random_tensor(1, queries, CHANNELS, device=device), random_tensor(1, SLOTS, CHANNELS, device=device)
    memory, scale = quantize_slots(wide, bits)
    rounded = Rotation(dequantize_slots(memory, scale))
    found = similarity_topk(query, memory, K, metric="dot", scale=scale).indices
    assert torch.equal(found, product_and_topk(query, rounded()))
    measure(
        f"{words(queries)}, {bits} bits",
        lambda rows: similarity_topk(query, rows, K, metric="dot", scale=scale),
        Rotation(memory),
        memory.numel() + scale.numel() * 4,
        2 * queries * wide.numel(),
        float32=lambda _: similarity_topk(query, rounded(), K, metric="dot"),
    )
