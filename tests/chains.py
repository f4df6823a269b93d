"""How much the order of a sum matters in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class _OneByOne(TorchDispatchMode):
    """Within it products of float32 matrices add their terms one by one, as each lane of a GPU does."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _PRODUCTS or args[0].dtype != torch.float32:
            return function(*args, **(kwargs or {}))
        a, b = args
        total: Tensor = a.new_zeros((*a.shape[:-1], b.shape[-1]))
        for k in range(a.shape[-1]):
            total += a[..., k, None] * b[..., k, None, :]
        return total


def _error(x: Tensor, wide: Tensor) -> float:
    return (x.double() - wide).nan_to_num().abs().max().item() if x.numel() else 0.0


def in_either_order(reference: Callable[[], Sequence[Tensor]], wide: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor of `reference()` in the order of sums that errs more from `wide`: PyTorch's on a CPU, or a GPU's.

    A product on the CPU adds its terms in many chains. How far that is from the truth is no measure by itself for
    code that adds them in one.
    """
    plain = reference()
    with _OneByOne():
        chained = reference()
    pairs = zip(plain, chained, wide, strict=True)
    return [a if _error(a, w) >= _error(b, w) else b for a, b, w in pairs]
