"""Time the dual memory against one that projects all slots again for every frame, eager and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.peers.reprojecting_memory import ReprojectingMemory
from benchmarks.timing import Rotation
from vmemory.banks import DualMemory
from vmemory.testing import assert_within_budget, random_tensor

GRID, HEADS, DIM = (14, 14), 7, 896
TOKENS, WORKING, EPISODIC = 196, 8, 32
SLOTS = WORKING + EPISODIC


def rivals(device: str, dtype: torch.dtype) -> tuple[DualMemory, ReprojectingMemory]:
    """Return two memories with equal weights and equal, full slots."""
    torch.manual_seed(0)
    memory = DualMemory(DIM, GRID, (WORKING, EPISODIC), heads=HEADS, device=device, dtype=dtype)
    peer = ReprojectingMemory(DIM, HEADS, memory.working_tokens[0], memory.episodic_tokens[0])
    memory.working.load_attention(peer.working_attention)
    memory.episodic.load_attention(peer.episodic_attention)
    memory.gate_in.load_state_dict(peer.gate[0].state_dict())
    memory.gate_out.load_state_dict(peer.gate[2].state_dict())
    # a multiple of the capacity, so that the first slot is the oldest
    memory.push(random_tensor(EPISODIC, *GRID, DIM, device=device, dtype=dtype, seed=1))
    peer.working.copy_(memory.working_tokens[0])
    peer.episodic.copy_(memory.episodic_tokens[0])
    return memory, peer


@torch.no_grad()
@pytest.mark.benchmark(group=f"dual memory: {WORKING} + {EPISODIC} slots of {TOKENS} × {DIM}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("whole", [False, True], ids=["read", "one frame in and out"])
def test_dual_memory(measure, device, whole, dtype):
    memory, peer = rivals(device, dtype)
    frame = random_tensor(TOKENS, DIM, device=device, dtype=dtype)

    def ours(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if whole:
            return memory.push(x.view(1, *GRID, DIM)).view(TOKENS, DIM)
        query = x[None]
        sides = (
            (memory.working, memory.working_keys, memory.working_values, memory.entered),
            (memory.episodic, memory.episodic_keys, memory.episodic_values, memory.written),
        )
        return tuple(reader(reader.query(query), *slots, None)[0] for reader, *slots in sides)

    theirs = peer.push if whole else peer.read
    torch._dynamo.reset()
    other = copy.deepcopy(peer)
    compiled = torch.compile(other.push if whole else other.read, dynamic=False)
    # two frames, so that the second reads the result of the first
    wide = copy.deepcopy(peer).double()
    for x in (frame, frame.flip(0)):
        assert_within_budget(ours(x), theirs(x), (wide.push if whole else wide.read)(x.double()))
    assert not whole or memory.entry[0].max() == EPISODIC + 1
    size = frame.element_size()
    # queries and answers of both; and keys and values of H_t twice, of M_t once, and the gate
    projected = 4 + (6 + 3 if whole else 0)
    weights = 8 + (3 if whole else 0)
    slots = 2 * SLOTS + (EPISODIC + 6 if whole else 0)
    measure(
        f"{'one frame in and out' if whole else 'read'}, {str(dtype).removeprefix('torch.')}",
        ours,
        Rotation(frame),
        size * (slots * TOKENS * DIM + weights * DIM * DIM + 2 * TOKENS * DIM),
        4 * TOKENS * SLOTS * TOKENS * DIM + 2 * projected * TOKENS * DIM * DIM,
        reprojecting=theirs,
        compile=compiled,
    )
