"""Inputs and gradients for the tests of `gated_fusion`."""

from __future__ import annotations

import torch
from torch import Tensor

from vmemory.ops import gated_fusion
from vmemory.testing import random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("relu", "gelu", "silu")
NAMES = ("working", "episodic", "w1", "b1", "w2", "b2")
# n, D, Hd
SHAPES = [(5, 8, 8), (37, 63, 1000), (100, 1000, 63), (729, 96, 64), (1, 1, 1), (17, 300, 5), (0, 8, 8), (3, 0, 5),
          (3, 4, 0)]  # fmt: skip


def inputs(n: int, D: int, Hd: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    shapes = [(n, D), (n, D), (Hd, 2 * D), (Hd,), (D, Hd), (D,)]
    x = [random_tensor(*shape, seed=i) for i, shape in enumerate(shapes)]
    x[2] /= max(1, 2 * D) ** 0.5
    x[4] *= 2 / max(1, Hd) ** 0.5
    return [t.to(device, dtype) for t in x]


def gradients(impl: str, x: list[Tensor], activation: str, wanted: tuple[str, ...] = NAMES) -> list[Tensor]:
    x = [t.clone().requires_grad_(name in wanted) for t, name in zip(x, NAMES, strict=True)]
    out = gated_fusion(*x, activation, impl=impl)
    grad = random_tensor(*out.shape, seed=9).to(out.device, out.dtype)
    return list(torch.autograd.grad(out, [t for t in x if t.requires_grad], grad))


def term_by_term(x: list[Tensor], activation: str, backwards: bool = False) -> Tensor:
    """The reference with every sum taken in a row, from either end; a matrix product of torch rounds less often."""
    working, episodic, w1, b1, w2, b2 = x

    def product(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, terms = bias.expand(len(rows), -1), range(weight.shape[1])
        for k in reversed(terms) if backwards else terms:
            total = torch.addcmul(total, rows[:, k, None], weight[None, :, k])
        return total

    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    gate = product(act(product(torch.cat([working, episodic], -1), w1, b1)), w2, b2).sigmoid()
    return gate * working + (1 - gate) * episodic


def wide(x: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in x]
