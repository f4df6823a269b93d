"""Awkward scores, and clips with what belongs to their tokens."""

from __future__ import annotations

import torch

from vmemory.ops import compact
from vmemory.testing import random_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")


def scores_with_ties(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Few distinct values, both zeros, infinities and NaN."""
    x = (random_tensor(*shape, seed=seed) * 3).round().to(dtype)
    odd = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    for at, value in enumerate((NAN, float("inf"), -float("inf"), -0.0)):
        x[(odd > at / 40) & (odd < (at + 1) / 40)] = value
    return x


def clip(dtype: torch.dtype = torch.float32, length: int = 63, kept: int = 21):
    """Tokens, positions, times, flags and a keep list with padding, out of range and repeated rows."""
    tokens = random_tensor(2, length, 5, 7, dtype=dtype)
    positions = torch.randint(0, 99, (2, length, 3))
    times = random_tensor(2, length, dtype=torch.float64, seed=2)
    flags = torch.rand(2, length) > 0.5
    keep = torch.randint(-2, length + 2, (2, kept), generator=torch.Generator().manual_seed(3))
    return tokens, keep, positions, times, flags


def gradients(impl: str, tokens, keep, times):
    variables = tokens.clone().requires_grad_(), times.clone().requires_grad_()
    moved, (when,) = compact(variables[0], keep, variables[1], impl=impl)
    weights = [random_tensor(*x.shape, seed=5).to(x.device, x.dtype) for x in (moved, when)]
    return torch.autograd.grad((moved, when), variables, weights)
