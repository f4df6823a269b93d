"""Ctrl-C in a push, other threads that read the archive meanwhile, and processes forked from one with an archive."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.memories import DIM, GRID, clip, same, seconds
from tests.test_banks import POLICIES, STORES, make
from vmemory import banks
from vmemory.banks.interrupts import delayed_interrupts


@pytest.fixture(autouse=True)
def _interrupts_are_python_s() -> Iterator[None]:
    """Whoever runs the tests in the background of a shell hands on that interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InterruptedAt(TorchDispatchMode):
    """Ctrl-C comes when the nth operator has run."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return out


def operators(bank, *arguments) -> int:
    """How many operators a push runs."""
    mode = InterruptedAt(0)
    with mode:
        bank.push(*arguments)
    return -mode.left


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["plain", "int8", "archive"])
def test_an_interrupted_push_takes_frames_in_or_not_but_never_by_half(policy, kind, pytestconfig) -> None:
    if policy == "dual" and kind != "plain":
        pytest.skip("a dual memory has neither")
    dtype = {"dtype": "int8"} if kind == "int8" else {}
    if kind == "archive":
        pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    video, after = clip(15), []
    for seen in range(16):
        after.append(make(policy, **dtype))
        after[-1].push(video[:seen], seconds(seen))

    def begun(frames: int = 11):
        bank = make(policy, **dtype)
        if kind == "archive":
            bank.archive = banks.Archive("1MiB")
        bank.push(video[:frames], seconds(frames))
        return bank

    whole, last = begun(15), operators(begun(), video[11:], seconds(15)[11:])
    # with --all a fifth of them, else eight, the first and the last among them
    places = range(1, last + 1, 5) if pytestconfig.getoption("--all") else range(1, last, max(1, last // 7))
    for place in (*places, last):
        bank, mode = begun(), InterruptedAt(place)
        with suppress(KeyboardInterrupt), mode:
            bank.push(video[11:], seconds(15)[11:])
        # an archive's thread may have left the last few to do, or not
        assert mode.left <= 0 or place > last * 0.8
        taken = bank.counts()["seen"]
        same(bank.state, after[taken].state)
        bank.push(video[taken:], seconds(15)[taken:])
        same(bank.state, after[15].state)
        if kind == "archive":
            # whoever is in one of the two is not missing
            assert torch.equal(bank.archive.read(0, 99).tokens, whole.archive.read(0, 99).tokens)


def test_an_interrupt_is_held_back_and_not_lost() -> None:
    done = []

    def step() -> None:
        with delayed_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
            with delayed_interrupts():
                signal.raise_signal(signal.SIGINT)
            done.append(2)

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # elsewhere Python calls no handlers, and none may be set
    thread = threading.Thread(target=lambda: [done.append(3) for _ in [0] if delayed_interrupts().__enter__() is None])
    thread.start()
    thread.join()
    assert done == [1, 2, 3]


@pytest.mark.parametrize("policy", STORES)
@pytest.mark.parametrize("keep", ["evicted", "frames"])
def test_recall_in_another_thread_sees_whole_frames_and_loses_none(policy: str, keep: str) -> None:
    pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    bank, alone, failed, over = make(policy), make(policy), [], threading.Event()
    # the mean of merged frames is nobody's number
    merged = policy == "merging" and keep == "evicted"
    for memory in (bank, alone):
        memory.archive = banks.Archive("4MiB", keep=keep, outbox=4, block=True)

    def recall() -> None:
        rounds = 0
        while not over.is_set() or rounds < 3:
            rounds += 1
            try:
                found = bank.archive.read(0, 999)
                # a frame is all of one number, and so are its tokens, but for the rounding of a mean
                if not merged and not torch.equal(found.tokens.round(), found.frame[:, None].expand(-1, DIM).float()):
                    failed.append("mixed frames")
                bank.archive.counts()
            except Exception as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=recall) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for t in range(120):
            frame = torch.full((1, *GRID, DIM), float(t))
            bank.push(frame, float(t))
            alone.push(frame, float(t))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert bank.archive.counts() == alone.archive.counts()
    assert torch.equal(bank.archive.read(0, 999).source, alone.archive.read(0, 999).source)
    assert torch.equal(bank.archive.read(0, 999).tokens, alone.archive.read(0, 999).tokens)


def _in_a_fork(bank, results) -> None:
    said = [str(bank.counts()["seen"]), str(bank.read().frame.unique().tolist())]
    for call in (
        lambda: bank.push(clip(1), 30.0),
        lambda: bank.archive.read(0, 99),
        lambda: bank.archive.flush(),
        lambda: bank.erase(0, 9),
        lambda: bank.reset(),
    ):
        try:
            call()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    said.append(str(bank.counts()["seen"]))
    bank.archive = None
    bank.push(clip(1), 30.0)
    results.put(said)


@pytest.mark.parametrize("policy", STORES)
def test_a_forked_process_reads_the_memory_and_is_told_that_the_archive_is_not_its_own(policy: str, tmp_path) -> None:
    pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    path, bank = tmp_path / "a.frames", make(policy)
    bank.archive = banks.Archive("64KiB", path)
    bank.push(clip(20), seconds(20))
    forking = multiprocessing.get_context("fork")
    results = forking.Queue()
    process = forking.Process(target=_in_a_fork, args=(bank, results))
    process.start()
    said = results.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    refused = "archive: expected the process that made it, got one forked from it, which cannot write"
    assert said == ["20", str(bank.read().frame.unique().tolist()), *[refused] * 5, "20"]
    # the parent goes on, and its file is free when it lets go of it, whoever else has inherited it
    bank.push(clip(3), seconds(3) + 20)
    stored = bank.archive.read(0, 99).tokens
    sleeper = os.fork()
    if sleeper == 0:
        signal.pause()
    try:
        bank.archive.close()
        again = make(policy)
        again.archive = banks.Archive("64KiB", path)
        assert torch.equal(again.archive.read(0, 99).tokens, stored)
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)
