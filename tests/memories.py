"""Small memories of every policy but the dual one, videos for them, and how two states are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from vmemory import banks
from vmemory.banks.policies.hierarchical import split
from vmemory.reference.bank_layout import SEEN, SKIPPED

GRID, DIM, ENTRIES = (4, 6), 8, 6
POLICIES = sorted(set(banks.POLICIES) - {"dual"})


def make(policy: str, entries: int = ENTRIES, **arguments) -> banks.Bank:
    size = {"capacity": split(entries, 3)} if policy == "hierarchical" else {"capacity": entries}
    return banks.build_memory(policy, **({"dim": DIM, "grid": GRID} | size | arguments))


def roomy(policy: str, entries: int, **arguments) -> banks.Bank:
    """A bank whose first tier holds so many frames as they come."""
    return make(policy, entries, **({"capacity": (entries, 2)} if policy == "hierarchical" else {}), **arguments)


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(frames, *GRID, DIM, generator=torch.Generator().manual_seed(seed)).cumsum(0)


def seconds(frames: int) -> Tensor:
    return torch.arange(frames, dtype=torch.float64)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    """Two states are equal to the bit."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name


def skip(bank: banks.Bank, frames: int, stream: int = 0) -> None:
    """Number on, as if frames had been left out of the stream."""
    bank.counter[stream, [SEEN, SKIPPED]] += frames


def holds(pattern: bytes, tensors) -> bool:
    return any(pattern in t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)


WRITER = """
import sys, torch
from vmemory import banks

bank = {bank}
bank.archive = banks.Archive(int(sys.argv[2]), sys.argv[1], block={block})
t = 0
while True:
    bank.push(torch.full((1, *bank.layout.grid, 8), float(t)), float(t))
    t += 1
    if t == 300:
        print("running", flush=True)
"""


def kill_a_writer(bank: str, path: Path, budget: int, block: bool = False) -> None:
    """A process that archives what `bank`, an expression, lets go, killed while it does."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(bank=bank, block=block), str(path), str(budget)],
        cwd=Path(banks.__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "running\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
