"""Exact search: native kernel against the reference, ties, masks and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from vmemory.ops import similarity_topk
from vmemory.testing import assert_within_budget, random_tensor


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("streams", "queries", "slots", "dim", "k"), [(1, 1, 7, 16, 3), (2, 9, 63, 33, 10), (1, 40, 200, 100, 300)]
)
def test_native_matches_reference(streams, queries, slots, dim, k, dtype, metric) -> None:
    query = random_tensor(streams, queries, dim, dtype=dtype)
    memory = random_tensor(streams, slots, dim, dtype=dtype, seed=1)
    count = torch.tensor([slots - 2, slots + 5][:streams])
    where = random_tensor(streams, slots, seed=2) > -1
    found = similarity_topk(query, memory, k, count=count, where=where, metric=metric, impl="native")
    low = similarity_topk(query, memory, k, count=count, where=where, metric=metric, impl="reference")
    wide = similarity_topk(
        query.double(), memory.double(), k, count=count, where=where, metric=metric, impl="reference"
    )
    assert_within_budget(found.values, low.values, wide.values)
    assert torch.equal(found.indices == -1, low.indices == -1)
    if dtype == torch.float64:
        assert torch.equal(found.indices, low.indices)


@pytest.mark.parametrize("queries", [1, 8, 64])
def test_equal_rows_keep_their_order(queries: int) -> None:
    memory = random_tensor(1, 1000, 24)
    for slot in (64, 517, 999):
        memory[0, slot] = memory[0, 3].clone()
    query = memory[:, 3:4].expand(-1, queries, -1).contiguous()
    assert similarity_topk(query, memory, 4).indices.tolist() == [[[3, 64, 517, 999]] * queries]


def test_places_that_cannot_be_filled() -> None:
    found = similarity_topk(torch.ones(1, 1, 4), torch.ones(1, 3, 4), 5, count=torch.tensor([2]))
    assert found.indices.tolist() == [[[0, 1, -1, -1, -1]]]
    assert found.values[0, 0, 2:].tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_gradients(metric: str) -> None:
    query = random_tensor(2, 3, 5, dtype=torch.float64).requires_grad_()
    memory = random_tensor(2, 9, 5, dtype=torch.float64, seed=1).requires_grad_()
    assert gradcheck(lambda a, b: similarity_topk(a, b, 4, metric=metric).values, (query, memory))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"k": 0}, "k: expected"), ({"metric": "l2"}, "metric: expected"), ({"impl": "cuda"}, "impl:")],
)
def test_bad_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        similarity_topk(torch.ones(1, 1, 4), torch.ones(1, 3, 4), **({"k": 1} | arguments))
