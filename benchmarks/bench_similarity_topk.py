"""Exact search beside faiss, and beside a matrix product with torch.topk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Rotation
from vmemory.ops import dequantize_slots, quantize_slots, similarity_topk
from vmemory.testing import random_tensor

SLOTS, CHANNELS, K = 100_000, 384, 10


def product_and_topk(query: Tensor, memory: Tensor) -> Tensor:
    return (query @ memory.transpose(1, 2)).topk(K).indices


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
    if device == "cpu":
        faiss = pytest.importorskip("faiss")
        flat = faiss.IndexFlatIP(CHANNELS)
        flat.add(memory[0].numpy())
        assert torch.equal(torch.from_numpy(flat.search(query[0].numpy(), K)[1])[None], found)
        others["faiss"] = lambda _: flat.search(query[0].numpy(), K)
    measure(
        f"{queries} queries" if queries > 1 else "1 query",
        lambda rows: similarity_topk(query, rows, K, metric="dot"),
        Rotation(memory),
        # read once, nothing to speak of is written
        memory.numel() * memory.element_size(),
        2 * queries * memory.numel(),
        **others,
    )


@pytest.mark.benchmark(group=f"similarity_topk: 1,000,000 × {CHANNELS} float32, k = {K}, dot product")
@pytest.mark.parametrize("queries", [1, 8])
def test_search_of_a_million(measure, device, queries):
    query, memory = random_tensor(1, queries, CHANNELS, device=device), torch.empty(1, 10 * SLOTS, CHANNELS)
    memory = memory.to(device).uniform_(-1, 1, generator=torch.Generator(device).manual_seed(0))
    assert torch.equal(similarity_topk(query, memory, K, metric="dot").indices, product_and_topk(query, memory))
    measure(
        f"{queries} {'queries' if queries > 1 else 'query'}, a million rows",
        lambda rows: similarity_topk(query, rows, K, metric="dot"),
        Rotation(memory),
        memory.numel() * memory.element_size(),
        2 * queries * memory.numel(),
        matmul_and_topk=lambda rows: product_and_topk(query, rows),
    )


@pytest.mark.benchmark(group=f"similarity_topk: {SLOTS:,} × {CHANNELS} in 8 and 4 bits, k = {K}, dot product")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("queries", [1, 8])
def test_search_in_few_bits(measure, device, queries, bits):
    query, wide = random_tensor(1, queries, CHANNELS, device=device), random_tensor(1, SLOTS, CHANNELS, device=device)
    memory, scale = quantize_slots(wide, bits)
    rounded = Rotation(dequantize_slots(memory, scale))
    found = similarity_topk(query, memory, K, metric="dot", scale=scale).indices
    assert torch.equal(found, product_and_topk(query, rounded()))
    measure(
        f"{queries} {'queries' if queries > 1 else 'query'}, {bits} bits",
        lambda rows: similarity_topk(query, rows, K, metric="dot", scale=scale),
        Rotation(memory),
        memory.numel() + scale.numel() * 4,
        2 * queries * wide.numel(),
        float32=lambda _: similarity_topk(query, rounded(), K, metric="dot"),
    )
