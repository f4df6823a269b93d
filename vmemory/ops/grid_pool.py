from __future__ import annotations

from torch import Tensor

from vmemory.ops._checks import check_choice, check_floating, check_pair, check_tensor
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import grid_pool as _reference

_BACKENDS = Backends("grid_pool")


def _fake(tokens: Tensor, size: list[int], mode: str) -> Tensor:
    return tokens.new_empty((tokens.shape[0], size[0], size[1], tokens.shape[3]))


_forward = Op("grid_pool", "(Tensor tokens, int[] size, str mode) -> Tensor", _fake)


@with_backends(_BACKENDS)
def grid_pool(tokens: Tensor, size: int | tuple[int, int], mode: str = "area", *, impl: Impl = "auto") -> Tensor:
    pair = check_pair("size", size)
    picked = _BACKENDS.pick(tokens, impl)
    if picked == "reference":
        return _reference.grid_pool(tokens, pair, mode)
    flat = tokens.reshape(-1, *tokens.shape[-3:])
    return _forward(picked, flat, pair, mode).reshape(*tokens.shape[:-3], *pair, tokens.shape[-1])
