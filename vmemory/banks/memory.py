"""The interface of all memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vmemory.banks.archive.archive import Archive
from vmemory.banks.arguments import Times
from vmemory.banks.io import BankFile
from vmemory.banks.results import Entries, MemoryTokens, SearchResult, Tier
from vmemory.reference.bank_layout import BankState

if TYPE_CHECKING:
    from vmemory.banks.dual.state import DualState


class Memory(Protocol):
    """A bounded memory of video frames: the common interface of `Bank` and `DualMemory`.

    `policy` is the name in `POLICIES`, `dim` the channels D and `grid` the tokens (H, W) of the frames, `key_dim` the
    channels that similarity looks at, `streams` S, `adapter` a module applied to frames first. `Bank` documents the
    methods.
    """

    policy: str
    dim: int
    grid: tuple[int, int]
    key_dim: int
    streams: int
    adapter: nn.Module | None
    entry: Tensor
    mass: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def state(self) -> BankState | DualState: ...

    @property
    def token_dtype(self) -> torch.dtype | None: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def tiers(self) -> tuple[Tier, ...]: ...

    @property
    def archive(self) -> Archive | None: ...

    @archive.setter
    def archive(self, archive: Archive | None) -> None: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def to_dict(self) -> dict[str, Any]: ...

    def push(
        self, frames: Tensor, time: Times = None, *, mask: Tensor | None = None, streams: Tensor | None = None
    ) -> Tensor | None: ...

    def compress(self, clip: Tensor, time: Times = None, *, mask: Tensor | None = None) -> MemoryTokens: ...

    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens: ...

    def search(self, query: Tensor, k: int, *, threshold: float | None = None, stream: int = 0) -> SearchResult: ...

    def entries(self, stream: int = 0) -> Entries: ...

    def counts(self, stream: int = 0) -> dict[str, int]: ...

    def bytes_in_use(self, stream: int = 0) -> int: ...

    def reset(self, streams: Sequence[int] | None = None) -> None: ...

    def snapshot(self) -> BankState | DualState: ...

    def restore(self, snapshot: tuple[Tensor, ...]) -> None: ...

    def check(self, snapshot: tuple[Tensor, ...]) -> None: ...

    def preserved(self) -> AbstractContextManager[None]: ...

    def fork(self, time: float | None = None) -> Memory: ...

    def erase(self, t0: float, t1: float, stream: int = 0) -> int: ...

    def save(
        self, path: str | Path, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None
    ) -> None: ...

    def to_file(self, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None) -> BankFile: ...
