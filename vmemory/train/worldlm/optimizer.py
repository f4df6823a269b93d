"""Muon: momentum whose matrices are made orthogonal, for the matrices of a small language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Steps of matrices along the nearest orthogonal matrix to their momentum (K. Jordan and others, 2024).

    Args:
        params: Matrices.
        lr: Length of a step, in units of a matrix's own scale.
        momentum: Share of the former direction that is kept.
        weight_decay: Share of a weight that a step of length 1 takes away.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.015, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it never calls one
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["direction"] = torch.zeros_like(weight)
                direction = state["direction"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(direction, group["momentum"])
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonal(ahead), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Move the singular values of a matrix near to 1, by five steps of a Newton-Schulz iteration of fifth order."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def optimizers(
    model: Any, matrices: float = 0.015, others: float = 1.5e-3, words: float = 2e-4
) -> list[torch.optim.Optimizer]:
    """Make the two optimizers of a language model: Muon for matrices, AdamW for embeddings and the rest.

    The vectors of words move slowly: the projector has learned to say them.
    """
    square = [weight for weight in model.model.language_model.layers.parameters() if weight.dim() == 2]
    table = model.get_input_embeddings().weight
    known = {id(weight) for weight in [*square, table]}
    rest = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in known]
    groups = [{"params": [table], "lr": words, "weight_decay": 0.0}, {"params": rest, "lr": others}]
    return [Muon(square, matrices), torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))]
