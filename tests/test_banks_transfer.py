"""Frames on their way from the outbox to the thread that stores them, on the CPU and beside a CUDA stream."""

from __future__ import annotations

import pytest
import torch

from tests.memories import DIM, GRID, POLICIES, clip, make, seconds
from vmemory import banks

pytest.importorskip("vmemory._host", reason="vmemory._host is not built")


class BusyThread:
    """A store whose thread has not come to an end with its batch."""

    def __init__(self, store) -> None:
        self._store, self.over = store, False

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def busy(self) -> bool:
        return not self.over


def test_frames_wait_in_the_outbox_while_a_batch_is_on_its_way() -> None:
    bank = make("recent")
    bank.archive = banks.Archive("1MiB", outbox=5)
    bank.push(clip(8), seconds(8))
    assert bank.archive.counts() == {"held": 2, "capacity": bank.archive.counts()["capacity"], "lost": 0}
    thread = BusyThread(bank.archive._store)
    bank.archive._transfer._store = thread
    bank.push(clip(7, seed=1), seconds(7) + 8)
    assert bank.archive.box.count.tolist() == [5, 2]
    thread.over = True
    bank.push(clip(1, seed=2), 15.0)
    # the frame that made it leave found the outbox full, and then went away with the others
    assert bank.archive.box.count.tolist() == [0, 3]
    assert bank.archive.read(0, 99).frame.unique().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert bank.archive.counts()["lost"] == 3


def test_a_blocking_archive_loses_nothing_however_small_its_outbox() -> None:
    bank = make("recent")
    bank.archive = banks.Archive("1MiB", outbox=1, block=True)
    bank.push(clip(200), seconds(200))
    assert bank.archive.counts()["lost"] == 0
    assert bank.archive.read(0, 999).frame.unique().tolist() == list(range(194))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keep", ["evicted", "frames"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"])
def test_pushes_on_a_device_never_wait_and_lose_nothing(policy: str, keep: str, dtype) -> None:
    kind = torch.float32 if dtype == "int8" else dtype
    bank, host = make(policy, device="cuda", dtype=dtype), make(policy, dtype=dtype)
    bank.archive, host.archive = banks.Archive("1MiB", keep=keep, outbox=8), banks.Archive("1MiB", keep=keep)
    video, time = clip(60).to(kind), seconds(60)
    on_device, device_time = video.cuda(), time.cuda()
    for start in range(0, 60, 6):
        torch.cuda.set_sync_debug_mode("error")
        try:
            bank.push(on_device[start : start + 6], device_time[start : start + 6])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # what the next pushes find free is what has arrived by then, and what the thread is done with
        torch.cuda.synchronize()
        bank.archive._transfer.arrived()
        bank.archive._store.wait()
    host.push(video, time)
    found, wanted = bank.archive.read(0, 99), host.archive.read(0, 99)
    assert bank.archive.counts()["lost"] == 0
    assert torch.equal(found.frame.cpu(), wanted.frame)
    assert torch.equal(found.source.cpu(), wanted.source)
    if keep == "frames":
        assert torch.equal(found.tokens.cpu(), wanted.tokens)


@pytest.mark.gpu
def test_copies_and_pushes_do_not_overtake_each_other() -> None:
    """Constant frames, large ones, many of them and no pause: a byte of another frame would show."""
    bank = banks.RecentBank(256, (16, 16), 2, device="cuda")
    bank.archive = banks.Archive("256MiB", outbox=4)
    for number in range(300):
        bank.push(torch.full((1, 16, 16, 256), float(number), device="cuda"))
    bank.archive.flush()
    stored = bank.archive._store.find(0, 0.0, 0.0, True)
    assert len(stored) + bank.archive.counts()["lost"] == 298
    for sequence, numbers, _ in stored:
        tokens, _ = bank.archive._load((sequence, numbers, []))
        assert bool((tokens == numbers[1]).all())


@pytest.mark.gpu
def test_an_outbox_of_another_stream_is_copied_when_its_push_has_written() -> None:
    bank = make("recent", device="cuda")
    bank.archive = banks.Archive("1MiB", outbox=4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number in range(12):
            # keeps the stream busy, so that a copy that does not wait comes too early
            torch.cuda._sleep(10_000_000)
            bank.push(torch.full((1, *GRID, DIM), float(number), device="cuda"), float(number))
            torch.cuda.synchronize()
        found = bank.archive.read(0, 99)
    assert found.frame.unique().tolist() == list(range(6))
    assert torch.equal(found.tokens, found.frame[:, None].float().expand(-1, DIM))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_push_fills_the_outbox_without_waiting(policy: str) -> None:
    bank, host = make(policy, device="cuda"), make(policy)
    bank.archive, host.archive = banks.Archive("1MiB"), banks.Archive("1MiB")
    buffer = clip(20)[:1].cuda()
    with bank.preserved():
        bank.push(buffer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bank.push(buffer)
    for t, frame in enumerate(clip(20)):
        buffer.copy_(frame[None])
        graph.replay()
        host.push(frame[None])
        if t % 7 == 0:
            bank.archive.drain()
    for memory in (bank, host):
        memory.archive.flush()
    assert bank.archive.counts() == host.archive.counts()
    assert torch.equal(bank.read().source.cpu(), host.read().source)
