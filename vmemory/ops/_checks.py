"""Argument checks of the public operators; each error names the argument, the expectation and the given value."""

from __future__ import annotations

from typing import Any

import torch

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def shape_of(x: torch.Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def check_tensor(name: str, x: Any, layout: str, dims: int | None = None, floating: bool = False) -> None:
    """Check that `x` is a tensor with as many dimensions as `layout`, e.g. "[S, M, D]", and of a floating dtype."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")
    if x.dim() != (layout.count(",") + 1 if dims is None else dims):
        raise ValueError(f"{name}: expected a tensor {layout}, got shape {shape_of(x)}")
    if floating and x.dtype not in _FLOATING:
        check_floating(name, x)


def check_floating(name: str, x: torch.Tensor) -> None:
    if x.dtype not in _FLOATING:
        raise ValueError(f"{name}: expected float64, float32, float16 or bfloat16, got {x.dtype}")


def check_same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that two tensors have the same dtype and device."""
    if x.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {x.dtype}")
    check_device(name, x, other_name, other)


def check_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {x.device}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}: expected {bounds}, got {value}")


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """Return an int or a pair of ints, both at least 1, as (height, width)."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    for side in pair:
        check_int(name, side, low=1)
    return int(pair[0]), int(pair[1])
