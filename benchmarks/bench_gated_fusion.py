"""Time gated fusion against its two bare products, which are its floor, and the usual four PyTorch calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Rotation
from vmemory.ops import gated_fusion
from vmemory.reference import gated_fusion as reference
from vmemory.testing import assert_within_budget, random_tensor

CASES = [
    ("729 tokens", 729, 1152, torch.float32),
    ("four frames", 2916, 1152, torch.float32),
    ("196 tokens", 196, 1024, torch.float32),
    ("729 tokens, bfloat16", 729, 1152, torch.bfloat16),
    ("four frames, bfloat16", 2916, 1152, torch.bfloat16),
    ("196 tokens, 3,584 channels, bfloat16", 196, 3584, torch.bfloat16),
    ("196 tokens, float16", 196, 1024, torch.float16),
]
IDS = [name for name, *_ in CASES]


def gate(D: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    w1, w2 = random_tensor(D, 2 * D, seed=1) / (2 * D) ** 0.5, random_tensor(D, D, seed=2) / D**0.5
    return [x.to(device, dtype) for x in (w1, random_tensor(D, seed=3), w2, random_tensor(D, seed=4))]


@pytest.mark.benchmark(group="gated_fusion")
@pytest.mark.parametrize(("name", "n", "D", "dtype"), CASES, ids=IDS)
def test_forward(measure, device, name, n, D, dtype):
    x, weights = random_tensor(2, n, D, dtype=dtype, device=device), gate(D, dtype, device)
    w1, _, w2, _ = weights
    both, hidden = torch.cat([x[0], x[1]], -1), random_tensor(n, D, dtype=dtype, device=device)
    exact = reference.gated_fusion(*x.double(), *(w.double() for w in weights))
    assert_within_budget(gated_fusion(*x, *weights), reference.gated_fusion(*x, *weights), exact)
    torch._dynamo.reset()
    compiled = torch.compile(reference.gated_fusion, dynamic=False)
    measure(
        name,
        lambda x: gated_fusion(*x, *weights),
        Rotation(x),
        (3 * n * D + w1.numel() + w2.numel()) * x.element_size(),
        2 * n * (w1.numel() + w2.numel()),
        eager=lambda x: reference.gated_fusion(*x, *weights),
        compile=lambda x: compiled(*x, *weights),
        products=lambda _: (both @ w1.T, hidden @ w2.T),
    )


def differentiate(function, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    out = function(*x, *weights)
    return torch.autograd.grad(out, [x, *weights], torch.ones_like(out))


@pytest.mark.benchmark(group="gated_fusion, forward + backward")
@pytest.mark.parametrize(("name", "n", "D", "dtype"), [CASES[0], CASES[3], CASES[6]], ids=[IDS[0], IDS[3], IDS[6]])
def test_forward_and_backward(measure, device, name, n, D, dtype):
    x = random_tensor(2, n, D, dtype=dtype, device=device).requires_grad_()
    weights = [w.requires_grad_() for w in gate(D, dtype, device)]
    wide = x.detach().double().requires_grad_(), [w.detach().double().requires_grad_() for w in weights]
    assert_within_budget(
        differentiate(gated_fusion, x, weights),
        differentiate(reference.gated_fusion, x, weights),
        differentiate(reference.gated_fusion, *wide),
    )
    torch._dynamo.reset()
    compiled = torch.compile(reference.gated_fusion, dynamic=False)
    products = weights[0].numel() + weights[2].numel()
    measure(
        name,
        lambda x: differentiate(gated_fusion, x, weights),
        Rotation(x),
        (11 * n * D + 3 * products) * x.element_size(),
        # products: once in forward, twice in backward, and the gate's again
        2 * n * (3 * products + weights[2].numel()),
        eager=lambda x: differentiate(reference.gated_fusion, x, weights),
        compile=lambda x: differentiate(compiled, x, weights),
    )
