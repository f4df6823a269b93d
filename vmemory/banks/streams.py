"""Which streams of a memory are meant, as callers say it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vmemory.ops._checks import check_int, check_tensor


def as_streams(streams: Iterable[int] | Tensor, S: int) -> Tensor:
    """Numbers of streams as int64 on the host.

    Raises:
        TypeError, ValueError: Not ints from 0 to S − 1.
    """
    if not isinstance(streams, Iterable):
        raise TypeError(f"streams: expected a sequence of ints, got {type(streams).__name__}")
    numbers = streams.tolist() if isinstance(streams, Tensor) else list(streams)
    for number in numbers:
        check_int("streams", number, low=0, high=S - 1)
    return torch.tensor(numbers, dtype=torch.int64)


def check_rows(streams: Any, S: int) -> None:
    """The stream of each row, `[S']` int64; where the host knows them, each below S and none twice.

    Raises:
        TypeError, ValueError: Something else; negative ones stand for rows that are skipped.
    """
    check_tensor("streams", streams, "[S]")
    if streams.dtype != torch.int64:
        raise ValueError(f"streams: expected int64, got {streams.dtype}")
    # tensors of a tracer are of another type, and have no values
    if streams.device.type == "cpu" and type(streams) is Tensor and not torch.compiler.is_compiling():
        named = [number for number in streams.tolist() if number >= 0]
        if named and max(named) >= S:
            raise ValueError(f"streams: expected less than {S}, got {max(named)}")
        if len(set(named)) < len(named):
            raise ValueError(f"streams: expected no stream twice, got {streams.tolist()}")
