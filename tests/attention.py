"""Queries and slots of every awkward shape, for the tests of attention over a memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.ops.memory_attention import memory_attention
from vmemory.testing import random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# S, N, G, E, M, n
SHAPES = [
    (1, 63, 2, 33, 5, 7),
    (3, 100, 3, 64, 4, 50),
    (2, 1, 1, 128, 3, 100),
    (1, 130, 1, 8, 1000, 1),
    (2, 5, 2, 1, 2, 3),
    (1, 17, 2, 200, 3, 65),
    (0, 3, 2, 8, 2, 3),
    (2, 0, 2, 8, 2, 3),
    (2, 3, 0, 8, 2, 3),
    (2, 3, 2, 8, 0, 3),
    (2, 3, 2, 8, 2, 0),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(S: int, N: int, G: int, E: int, M: int, n: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Streams hold M + 1, 1, 0, ... items; slots that are not valid hold NaN."""
    query = random_tensor(S, N, G, E, dtype=dtype, seed=1)
    keys, values = (random_tensor(S, M, n, G, E, dtype=dtype, seed=seed) for seed in (2, 3))
    count = torch.tensor([M + 1, 1, 0][:S], dtype=torch.int64)
    for s in range(S):
        keys[s, count[s] :] = values[s, count[s] :] = float("nan")
    return query, keys, values, count


def outputs(impl: str, query: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> list[Tensor]:
    """The result and the gradients of the three."""
    leaves = [x.clone().requires_grad_() for x in (query, keys, values)]
    out = memory_attention(*leaves, count, impl=impl)
    grad = random_tensor(*out.shape, seed=4).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def widened(query: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Inputs:
    return query.double(), keys.double(), values.double(), count
