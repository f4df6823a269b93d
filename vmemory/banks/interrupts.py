"""Delay Ctrl-C until a memory is whole again."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import FrameType
from typing import Any

import torch

# what `signal` itself is made of: its own functions turn handlers into enums, which takes longer than some pushes
_raw = import_module("_signal")


class _Delayed:
    def __init__(self) -> None:
        self._before: Any = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        # Python calls handlers in its main thread alone
        if threading.current_thread() is threading.main_thread():
            before = _raw.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                _raw.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            _raw.signal(signal.SIGINT, self._before)
            if self._came is not None:
                self._before(*self._came)


def delayed_interrupts() -> AbstractContextManager[None]:
    """Run a block of operators that change a memory together, and let Ctrl-C take effect when it is done.

    Otherwise a memory could hold a frame's tokens without its number, and nobody could tell.
    """
    return nullcontext() if torch.compiler.is_compiling() else _Delayed()
