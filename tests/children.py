"""Processes that tests start end with the process that started them, however that ends."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from vmemory.testing import end_with_parent

_parent = 0


def _remember() -> None:
    global _parent
    _parent = os.getpid()


def _end() -> None:
    end_with_parent(_parent)


class _Child(subprocess.Popen):
    """`subprocess` forks without Python's hooks unless there is something to call in the child."""

    def __init__(self, *args, **options) -> None:
        # a child of another thread than the first may crash in a call between fork and exec
        if threading.current_thread() is threading.main_thread():
            options["preexec_fn"] = options.get("preexec_fn") or _nothing
        super().__init__(*args, **options)


def _nothing() -> None:
    pass


def end_with_this_process() -> None:
    """Have every process that this one forks or starts killed when this one ends, as after a crash or a SIGKILL."""
    os.register_at_fork(before=_remember, after_in_child=_end)
    subprocess.Popen = _Child  # type: ignore[misc]


def running() -> Iterator[str]:
    """The command lines of this process's children, but for those of multiprocessing, which serve a whole session."""
    for file in Path("/proc/self/task").glob("*/children"):
        for child in file.read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "multiprocessing" not in command:
                yield f"{child}: {command}"
