"""Time column sums of an attention map against eager PyTorch, which stores the map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Rotation
from vmemory.ops import attention_column_sums
from vmemory.reference import attention_column_sums as reference
from vmemory.testing import assert_within_budget, random_tensor

HEADS, CHANNELS = 12, 64


@pytest.mark.benchmark(group=f"attention_column_sums: {HEADS} × {CHANNELS}")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("tokens", "causal", "dtype"),
    [(729, False, torch.float32), (2048, False, torch.float32), (2048, True, torch.float32),
     (2048, False, torch.bfloat16)],
)  # fmt: skip
def test_column_sums(measure, device, tokens, causal, dtype, backward):
    query, key = (random_tensor(1, tokens, HEADS, CHANNELS, dtype=dtype, device=device, seed=s) for s in (0, 1))

    def run(x: Tensor, y: Tensor, impl: str) -> tuple[Tensor, ...]:
        x, y = x.detach().requires_grad_(backward), y.detach().requires_grad_(backward)
        sums = attention_column_sums(x, y, causal=causal, impl=impl)
        return (sums, *torch.autograd.grad(sums, (x, y), torch.ones_like(sums).cumsum(-1))) if backward else (sums,)

    low, wide = run(query, key, "reference"), run(query.double(), key.double(), "reference")
    assert_within_budget(run(query, key, "auto"), low, wide)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: reference.attention_column_sums(x, y, causal).sum(1), dynamic=False)
    others = {} if backward else {"compile": lambda x: compiled(x, key)}
    # products of the map itself: computed twice in forward, three times in backward with two more products
    products = 1 + 4 * backward
    measure(
        f"{tokens} × {tokens}, {'causal, ' if causal else ''}{str(dtype).removeprefix('torch.')}"
        f"{', forward and backward' if backward else ''}",
        lambda x: run(x, key, "auto"),
        Rotation(query),
        query.element_size() * 2 * query.numel() * (1 + backward),
        products * 2 * tokens * query.numel() * (0.5 if causal else 1),
        eager=lambda x: run(x, key, "reference"),
        **others,
    )
