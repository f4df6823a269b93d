"""One thread at a time in a memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib import import_module
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

import torch

# the class itself, which `threading` hides behind a function: entering it takes no Python code
_RLock: Any = import_module("_thread").RLock
_locks: WeakSet[Any] = WeakSet()


class MemoryLock(_RLock):
    """A lock that the thread which holds it may take again. Copies and pickles of a memory get one of their own."""

    def __init__(self) -> None:
        _locks.add(self)

    def __reduce__(self) -> tuple[type[MemoryLock], tuple[()]]:
        return MemoryLock, ()


class _LostLock(MemoryLock):
    """The lock in a forked process whose holder does not exist there; its change may be incomplete."""

    def __enter__(self) -> NoReturn:
        raise RuntimeError(
            "memory: expected a process forked between two calls, got one forked while another thread was changing "
            "the memory; load or make it anew here"
        )


def _after_fork() -> None:
    for lock in list(_locks):
        if lock.acquire(blocking=False):
            lock.release()
        else:
            lock.__class__ = _LostLock


os.register_at_fork(after_in_child=_after_fork)


class _Locked(Protocol):
    _lock: MemoryLock


_Self = TypeVar("_Self", bound=_Locked)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def alone(lock: MemoryLock) -> AbstractContextManager[Any]:
    """Return a context that one thread enters at a time; compiled code takes no lock."""
    return nullcontext() if torch.compiler.is_compiling() else lock


def locked(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result]:
    """Run the method with the memory's lock held."""

    @wraps(method)
    def run(self: _Self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with alone(self._lock):
            return method(self, *args, **kwargs)

    return run
