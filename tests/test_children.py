"""No process outlives the tests that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import os, signal, subprocess, sys
from tests.children import end_with_this_process
end_with_this_process()
children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]).pid]
forked = os.fork()
if not forked:
    signal.pause()
children.append(forked)
print(*children, flush=True)
signal.pause()
"""


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_children_end_when_their_parent_is_killed() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            children = [int(word) for word in parent.stdout.readline().split()]
            assert len(children) == 2
            assert all(alive(child) for child in children)
        finally:
            parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [child for child in children if alive(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert left == []
