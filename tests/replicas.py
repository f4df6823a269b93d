"""Replicas of a module as `nn.parallel.replicate` makes them, on the CPU, and functions that run over them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate


def replicas(model: nn.Module, devices: int = 2) -> list[Any]:
    """Replicas for so many devices. torch's own code; only the weights' way to a device is a copy."""

    def sent(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[x.detach().clone() if detach else x.clone() for x in tensors] for _ in devices]

    with mock.patch.object(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", sent):
        return replicate(model, list(range(devices)))


def sent(value: Any) -> Any:
    """Tensors, in lists and tuples too, as they arrive on another device: copies without attributes."""
    if isinstance(value, list | tuple):
        return type(value)(map(sent, value))
    return value.clone()


def parallel_apply(function: Callable[..., Any], model: nn.Module, inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """`function(replica, *input)` for each input, each in a thread of its own, as CLIP4Clip's evaluation does it."""
    results: list[Any] = [None] * len(inputs)
    grad = torch.is_grad_enabled()

    def work(place: int, replica: Any) -> None:
        torch.set_grad_enabled(grad)
        try:
            results[place] = function(replica, *inputs[place])
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(replicas(model, len(inputs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
