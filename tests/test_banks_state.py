"""Memories that go back, branch off and forget: preserved, fork, erase, and the file that is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.memories import DIM, ENTRIES, GRID, POLICIES, clip, holds, make, roomy, same, seconds, skip
from vmemory import banks
from vmemory.ops.bank import bank_push_
from vmemory.reference.bank_layout import FRAME, LENGTH

COMPARING = {"hierarchical", "merging", "episodic"}


@pytest.mark.parametrize("policy", POLICIES)
def test_preserved_leaves_no_trace_and_the_same_tensors(policy: str) -> None:
    bank = make(policy)
    bank.push(clip(5))
    before, where = bank.snapshot(), [t.data_ptr() for t in bank.state]
    with bank.preserved():
        bank.push(clip(20, seed=1))
        assert bank.counts()["seen"] == 25
    same(bank.state, before)

    def fail() -> None:
        with bank.preserved():
            bank.push(clip(3))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    same(bank.state, before)
    assert [t.data_ptr() for t in bank.state] == where


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fork_goes_its_own_way_and_shares_the_adapter(policy: str) -> None:
    adapter = banks.FeatureAdapter(DIM, DIM)
    bank = make(policy, adapter=adapter)
    bank.push(clip(9))
    before = bank.snapshot()
    twin = bank.fork()
    assert twin.adapter is adapter
    same(twin.state, before)
    twin.push(clip(9, seed=1))
    same(bank.state, before)
    bank.push(clip(9, seed=1))
    same(bank.state, twin.state)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fork_in_the_past_is_the_memory_of_then(policy: str) -> None:
    bank, then = roomy(policy, 12, streams=2), roomy(policy, 12, streams=2)
    both = clip(10).expand(2, -1, -1, -1, -1)
    bank.push(both, seconds(10))
    then.push(both[:, :4], seconds(4))
    same(bank.fork(3.5).state, then.state)
    same(bank.fork(9.0).state, bank.state)
    same(bank.fork(-1.0).state, roomy(policy, 12, streams=2).state)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fork_of_what_is_gone_is_refused(policy: str) -> None:
    bank = make(policy)
    bank.push(clip(30), seconds(30))
    before = bank.snapshot()
    with pytest.raises(ValueError, match=r"time: expected every frame up to 20\.0 s of stream 0 to be whole"):
        bank.fork(20.0)
    same(bank.state, before)
    same(bank.fork(29.0).state, before)
    bank.reset()
    bank.push(clip(3))
    with pytest.raises(ValueError, match="expected a memory whose frames all came with a time, got 3"):
        bank.fork(1.0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("t0", "t1"), [(3, 5), (0, 2), (8, 9), (6.5, 6.6), (-5, 50)])
def test_erased_equals_never_seen_where_all_is_whole(policy: str, t0: float, t1: float) -> None:
    bank, never = roomy(policy, 12, streams=2), roomy(policy, 12, streams=2)
    video, other = clip(10), clip(10, seed=1)
    bank.push(torch.stack([video, other]), seconds(10))
    never.push(other[None], seconds(10), streams=torch.tensor([1]))
    gone = [t for t in range(10) if t0 <= t <= t1]
    for t in range(10):
        if t in gone:
            skip(never, 1)
        else:
            never.push(video[None, t : t + 1], [float(t)], streams=torch.tensor([0]))
    assert bank.erase(t0, t1) == len(gone)
    same(bank.state, never.state)
    # and the two go on alike, through evictions
    for memory in (bank, never):
        memory.push(clip(20, seed=2).expand(2, -1, -1, -1, -1), seconds(20) + 10)
    same(bank.state, never.state)


@pytest.mark.parametrize("policy", POLICIES)
def test_erased_equals_never_seen_with_missing_cells(policy: str) -> None:
    mask = torch.rand(10, *GRID, generator=torch.Generator().manual_seed(3)) > 0.4
    bank, never = roomy(policy, 12), roomy(policy, 12)
    bank.push(clip(10), seconds(10), mask=mask)
    never.push(clip(10)[:4], seconds(4), mask=mask[:4])
    skip(never, 2)
    never.push(clip(10)[6:], seconds(10)[6:], mask=mask[6:])
    bank.erase(4, 5)
    same(bank.state, never.state)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drop_dependent", [True, False])
def test_erase_after_evictions_keeps_nothing_of_the_span(policy: str, drop_dependent: bool) -> None:
    bank = make(policy, entries=12)
    bank.push(clip(40), seconds(40))
    held = bank.entries()
    t0, t1 = float(held.start[-4]), float(held.stop[-3])
    hit = (held.start <= t1) & (held.stop >= t0)
    assert int(hit.sum()) == 2
    if drop_dependent and policy in COMPARING:
        hit |= held.stop >= t0
    expected, tokens = held.frame[~hit], bank.read()
    assert bank.erase(t0, t1, drop_dependent=drop_dependent) == int(hit.sum())
    after = bank.entries()
    assert torch.equal(after.frame, expected)
    assert torch.equal(after.descriptor, held.descriptor[~hit])
    kept = torch.isin(tokens.frame, expected)
    assert torch.equal(bank.read().tokens, tokens.tokens[kept])
    assert torch.equal(bank.read().source, tokens.source[kept])
    free = bank.entry[0, :, FRAME] < 0
    for name in ("descriptor", "norm", "clock"):
        assert not getattr(bank, name)[0, free].any(), name
    assert not bank.slots[0][bank.mass[0] == 0].any()
    assert bank.counts()["held"] == len(expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, "int8"])
def test_an_early_span_goes_to_the_last_byte_and_the_rest_stays(policy: str, dtype: torch.dtype | str) -> None:
    """Frames of the span alone have something in channel 0, so that all that was computed from them shows."""
    bank = make(policy, entries=12, dtype=dtype)
    video = clip(40)
    video[..., 0] = 0
    video[6:9, ..., 0] = 50
    bank.push(video, seconds(40))
    held = bank.entries()
    hit = (held.start <= 8) & (held.stop >= 6)
    assert bank.erase(6, 8) == int(hit.sum())
    after = bank.entries()
    assert torch.equal(after.frame, held.frame[~hit])
    assert len(after.frame) > 0
    assert not bank.read().tokens[..., 0].any()
    assert not bank.descriptor[..., 0].any()
    # and the cosines of neighbours are those of what is left
    before = bank.link.clone()
    bank.erase(6, 8)
    assert torch.equal(bank.link, before)


@pytest.mark.parametrize("policy", ["hierarchical", "merging", "uniform", "recent"])
def test_pushes_after_an_erase_decide_as_the_reference(policy: str, native) -> None:
    bank = make(policy, entries=12)
    bank.push(clip(40), seconds(40))
    bank.erase(31, 33)
    oracle = bank.snapshot()
    later, when = clip(30, seed=5) + 3, seconds(30) + 40
    bank.push(later, when)
    bank_push_(oracle, bank.layout, later[None], time=when[None], impl="reference")
    assert torch.equal(bank.entry, oracle.entry)
    assert torch.equal(bank.order, oracle.order)
    assert torch.equal(bank.counter, oracle.counter)


@pytest.mark.parametrize("policy", ["episodic", "reservoir"])
def test_slot_memories_fill_what_an_erase_freed(policy: str) -> None:
    bank = make(policy)
    bank.push(clip(30), seconds(30))
    newest = int(bank.entries().frame[-1])
    bank.erase(float(newest), 29)
    held = bank.counts()["held"]
    assert held < ENTRIES
    bank.push(clip(ENTRIES - held, seed=1), seconds(ENTRIES - held) + 30)
    assert bank.counts()["held"] == ENTRIES
    assert bank.entries().frame.tolist()[held:] == list(range(30, 30 + ENTRIES - held))
    bank.push(clip(9, seed=2), seconds(9) + 50)
    assert int(bank.counter[0, LENGTH]) == ENTRIES


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_erase_changes_nothing(policy: str, monkeypatch) -> None:
    bank = make(policy)
    bank.push(clip(4), seconds(4))
    before = bank.snapshot()
    for error, arguments, words in (
        (ValueError, {"t0": 5.0, "t1": 4.0}, r"t0: expected at most t1 \(4.0 s\), got 5.0"),
        (ValueError, {"t0": float("nan"), "t1": 4.0}, "t0: expected at most t1"),
        (ValueError, {"t0": 0.0, "t1": 1.0, "stream": 1}, "stream: expected between 0 and 0"),
        (TypeError, {"t0": 0.0, "t1": 1.0, "drop_dependent": "some"}, "drop_dependent: expected True or False"),
    ):
        with pytest.raises(error, match=words):
            bank.erase(**arguments)
        same(bank.state, before)
    bank.push(clip(1))
    before = bank.snapshot()
    with pytest.raises(ValueError, match="expected a memory whose frames all came with a time, got 1 entries"):
        bank.erase(0, 1)
    same(bank.state, before)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frames", [5, 40])
def test_no_byte_of_the_span_is_left_in_buffers_or_file(policy: str, frames: int, tmp_path) -> None:
    bank = make(policy, entries=12)
    video, path = clip(frames), tmp_path / "m.vmem"
    start = frames - 3
    # a constant frame keeps its value through every pooling and every mean
    video[start:] = 1234.0625
    pattern = torch.tensor([1234.0625]).numpy().tobytes()
    bank.push(video, seconds(frames))

    def found() -> list[str]:
        return [n for n, t in bank.named_buffers() if holds(pattern, [t])]

    bank.save(path)
    assert "slots" in found()
    assert "descriptor" in found()
    assert pattern in path.read_bytes()
    bank.erase(start, frames)
    assert found() == []
    bank.save(path)
    assert pattern not in path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.vmem"]


WRITER = """
import sys, torch, safetensors.torch
from pathlib import Path
from vmemory import banks

def slow(tensors, target, metadata):
    whole = safetensors.torch.save(tensors, metadata)
    with open(target, "wb") as file:
        file.write(whole[: len(whole) // 2])
        file.flush()
        print("half", flush=True)
        sys.stdin.read()

bank, _ = banks.load(sys.argv[1])
bank.push(torch.ones(1, *bank.layout.grid, bank.layout.dim))
safetensors.torch.save_file = slow
bank.save(sys.argv[1])
"""


def test_the_file_survives_a_writer_killed_in_the_middle(tmp_path) -> None:
    path, bank = tmp_path / "m.vmem", make("recent")
    bank.push(clip(9))
    bank.save(path)
    before = path.read_bytes()
    root = Path(banks.__file__).parents[2]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdin is not None
    assert writer.stdout.readline() == "half\n"
    partial = [p for p in tmp_path.iterdir() if p != path]
    assert len(partial) == 1
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    assert path.read_bytes() == before
    with pytest.raises(banks.BankFileError, match="not a whole"):
        banks.load(partial[0])
    same(banks.load(path)[0].state, bank.state)
    # what the killed writer left went with it
    assert list(tmp_path.iterdir()) == [path]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hundred_thousand_frames_stay_within_the_budget(policy: str) -> None:
    bank = banks.build_memory(policy, dim=4, grid=(2, 2), budget="256KiB", streams=50)
    frames = torch.randn(50, 100, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    size = bank.nbytes
    assert size <= 256 * 1024
    for step in range(20):
        if step == 2:
            before = resident()
        bank.push(frames, seconds(100) + 100 * step)
    assert bank.nbytes == size
    assert sum(bank.counts(s)["seen"] for s in range(50)) == 100_000
    assert resident() - before < 8 * 2**20
