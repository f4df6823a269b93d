"""Blend two memory readings by a learned gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def gated_fusion(
    working: Tensor, episodic: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str = "relu"
) -> Tensor:
    """Blend `working` and `episodic`, both `[..., D]`, with `w1 [Hd, 2D]`, `w2 [D, Hd]`; gelu by the error function.

    Every step rounds to the inputs' dtype. NaN in a token or in the gate gives NaN, and so does an infinite token whose
    share is zero.
    """
    hidden = ACTIVATIONS[activation](F.linear(torch.cat([working, episodic], -1), w1, b1))
    gate = torch.sigmoid(F.linear(hidden, w2, b2))
    return gate * working + (1 - gate) * episodic
