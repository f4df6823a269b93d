"""Checks of arguments: one error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from vmemory.graph.categories import Category

# bytes of a label, a predicate, or the name of a user or video
MAX_NAME = 4096
# bytes of a caption
MAX_TEXT = 65_536


class TextEncoder(Protocol):
    """Anything that embeds sentences, as `vmemory.encoders.SentenceEncoder`."""

    def encode(self, texts: list[str]) -> Tensor:
        """Return vectors `[N, dim]`."""
        ...


def text(name: str, given: object, most: int = MAX_TEXT) -> str:
    """Return text that is not blank and can be stored."""
    if not isinstance(given, str):
        raise TypeError(f"{name}: expected a string, got {type(given).__name__}")
    if not given.strip():
        raise ValueError(f"{name}: expected words, got {given!r}")
    try:
        nbytes = len(given.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text without lone surrogates, got {given[:40]!r}") from None
    if nbytes > most:
        raise ValueError(f"{name}: expected at most {most} bytes, got {nbytes}")
    return given


def number(name: str, given: object, *, infinite: bool = False) -> float:
    """Return a finite number of seconds, or one that may be infinite."""
    if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: expected a number of seconds, got {type(given).__name__}")
    value = float(given)
    if math.isnan(value) or (math.isinf(value) and not infinite):
        raise ValueError(f"{name}: expected a finite number of seconds, got {value}")
    return value


def count(name: str, given: object, low: int, high: int) -> int:
    """Return an integer in a range."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {type(given).__name__}")
    if not low <= given <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {given}")
    return int(given)


def unit(name: str, given: object, dim: int) -> np.ndarray:
    """Return a vector `[dim]` or `[1, dim]` scaled to length 1, float32."""
    if not isinstance(given, Tensor | np.ndarray):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    values = given.detach().float().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given, np.float32)
    if values.shape not in ((dim,), (1, dim)):
        raise ValueError(f"{name}: expected {dim} values [{dim}], got shape {list(values.shape)}")
    values = values.reshape(dim)
    length = math.sqrt(float(np.dot(values, values)))
    if not 1e-30 < length < math.inf:
        raise ValueError(f"{name}: expected finite values that are not all 0, got a vector of length {length}")
    return (values / np.float32(length)).astype(np.float32, copy=False)


def categories(given: Sequence[Category]) -> list[Category]:
    """Return categories, each a name, a group and a description, with names of their own."""
    found = []
    for category in given:
        if not isinstance(category, Category):
            raise TypeError(f"categories: expected Category(name, group, description), got {type(category).__name__}")
        for name, value in category._asdict().items():
            text(f"categories, {name}", value, MAX_NAME)
        found.append(category)
    names = {category.name for category in found}
    if len(names) < len(found) or not 1 <= len(found) <= 10_000:
        raise ValueError(f"categories: expected 1 to 10000 of different names, got {len(found)} of {len(names)} names")
    return found
