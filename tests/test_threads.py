"""Memories used from several threads at once, and from forked processes: nothing torn, nothing lost, nobody waits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from tests.memories import POLICIES, make, seconds
from vmemory import banks
from vmemory.banks.lock import MemoryLock
from vmemory.banks.state import check_state

DIM, GRID = 8, (4, 6)
SECONDS = 0.3

pytestmark = pytest.mark.usefixtures("one_thread")


def frame(value: float) -> torch.Tensor:
    return torch.full((1, *GRID, DIM), value)


def all_at_once(*calls: Callable[[], object], lasting: float = SECONDS) -> list[int]:
    """Every call again and again, each in a thread of its own; how often each came through."""
    stop, failed = time.monotonic() + lasting, []
    done = [0] * len(calls)

    def run(i: int) -> None:
        try:
            while not failed and (time.monotonic() < stop or done[i] == 0):
                calls[i]()
                done[i] += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if failed:
        raise failed[0]
    return done


def assert_whole(policy: str, tokens: banks.MemoryTokens) -> None:
    """Frames are all of the number they have; a mean of several is not, but its own rows are alike."""
    assert torch.equal(tokens.tokens, tokens.tokens[:, :1].expand_as(tokens.tokens)), policy
    if policy not in ("merging", "dual"):
        assert torch.equal(tokens.tokens[:, 0].round(), tokens.frame.float()), policy


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("archived", [False, True])
def test_three_pushers_and_every_other_call_at_once(policy: str, archived: bool, tmp_path) -> None:
    if archived:
        pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    bank, counted = make(policy), threading.Lock()
    if archived:
        bank.archive = banks.Archive("256KiB", tmp_path / "a.frames", block=True)
    path, numbers = tmp_path / "a.vmem", iter(range(10**9))

    def push() -> None:
        # numbers in the order in which frames get in
        with counted:
            bank.push(frame(float(next(numbers))))

    def save_and_load() -> None:
        bank.save(path)
        assert_whole(policy, banks.load(path)[0].read())

    def go_back() -> None:
        bank.restore(bank.snapshot())

    others = [bank.read, save_and_load, bank.entries, lambda: bank.search(torch.ones(1, DIM), 3), bank.fork]
    if archived:
        others += [lambda: bank.archive.read(0, 1e9), bank.archive.counts]
    done = all_at_once(push, push, push, *others)
    assert bank.counts()["seen"] == sum(done[:3])
    assert_whole(policy, bank.read())
    held = bank.entries().frame.tolist()
    assert held == sorted(set(held))
    # going back makes numbers come twice
    all_at_once(push, push, go_back, bank.reset)
    check_state(bank.layout, bank.snapshot())


@pytest.mark.parametrize("policy", POLICIES)
def test_pushers_that_nobody_orders_lose_no_frame(policy: str) -> None:
    bank = make(policy)
    done = all_at_once(*(lambda i=i: bank.push(frame(float(i))) for i in range(4)))
    assert bank.counts()["seen"] == sum(done)
    assert torch.equal(bank.read().tokens, bank.read().tokens[:, :1].expand(-1, DIM))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_beside_pushes_is_of_one_moment(policy: str, tmp_path) -> None:
    bank, path, numbers = make(policy), tmp_path / "a.vmem", iter(range(10**9))
    bank.push(frame(0.0), float(next(numbers)))

    def push() -> None:
        number = float(next(numbers))
        bank.push(frame(number), number)

    def save() -> None:
        bank.save(path)
        loaded, _ = banks.load(path)
        assert_whole(policy, loaded.read())

    pushed, saved = all_at_once(push, save)
    assert min(pushed, saved) > 0


def test_a_memory_that_is_reset_erased_and_pushed_to_at_once() -> None:
    bank = make("hierarchical")
    numbers = iter(range(10**9))

    def push() -> None:
        bank.push(frame(1.0), float(next(numbers)))

    all_at_once(push, bank.reset, lambda: bank.erase(0.0, 3.0), lambda: bank.fork().push(frame(2.0)), bank.read)
    check_state(bank.layout, bank.snapshot())


def test_a_dual_memory_from_several_threads(tmp_path) -> None:
    memory = banks.DualMemory(DIM, GRID, (2, 3), heads=2, residual=True)
    path = tmp_path / "a.vmem"

    def save() -> None:
        memory.save(path)
        assert_whole("dual", banks.load(path)[0].read())

    done = all_at_once(
        lambda: memory.push(frame(1.0)), lambda: memory.push(frame(2.0)), save, memory.read, memory.fork,
        lambda: memory.restore(memory.snapshot()),
    )  # fmt: skip
    assert memory.counts()["seen"] <= sum(done[:2])
    all_at_once(lambda: memory.push(frame(1.0)), memory.reset, memory.refresh)


def test_a_key_value_memory_lets_one_thread_in() -> None:
    pytest.importorskip("transformers")
    from tests.kv_texts import text_model
    from vmemory.kv import KVMemory

    model = text_model()
    memory, ids, refused = KVMemory(16, "recent"), torch.arange(3, 27)[None], []

    def prefill() -> None:
        try:
            memory.prefill(model, ids, chunk=8)
        except ValueError as error:
            refused.append(str(error))

    all_at_once(prefill, prefill)
    # by name, and not by what a gather says of an index
    assert all(words.startswith("cache: expected") for words in refused)
    assert memory.prefill(model, ids, chunk=8).cache.get_seq_length() == 16


def test_preserved_keeps_others_out_until_it_ends() -> None:
    bank, over = make("recent"), threading.Event()
    bank.push(frame(1.0))

    def push() -> None:
        bank.push(frame(2.0))
        over.set()

    with bank.preserved():
        thread = threading.Thread(target=push)
        thread.start()
        bank.push(frame(3.0))
        assert not over.wait(0.2)
    thread.join(10)
    assert bank.read().tokens[:, 0].unique().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("policy", [*POLICIES, "dual"])
def test_every_call_waits_for_the_one_before(policy: str, tmp_path) -> None:
    bank = banks.DualMemory(DIM, GRID, (2, 3), heads=2) if policy == "dual" else make(policy)
    bank.push(frame(0.0), 0.0)
    kept = bank.snapshot()
    calls: dict[str, Callable[[], object]] = {
        "push": lambda: bank.push(frame(1.0)), "read": bank.read, "padded": lambda: bank.read(padded=True),
        "search": lambda: bank.search(torch.ones(1, DIM), 1), "entries": bank.entries, "counts": bank.counts,
        "save": lambda: bank.save(tmp_path / "a.vmem"), "snapshot": bank.snapshot,
        "restore": lambda: bank.restore(kept), "reset": bank.reset, "fork": bank.fork,
        "erase": lambda: bank.erase(5.0, 6.0), "to": lambda: bank.to("cpu"),
    }  # fmt: skip
    if policy == "dual":
        calls["refresh"] = bank.refresh
    done, failed = [], []

    def run(name: str) -> None:
        try:
            calls[name]()
        except ValueError as error:
            # frames without a time cannot be erased by it
            failed.append((name, str(error)))
        done.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in calls]
    with bank.preserved():
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert done == []
    for thread in threads:
        thread.join(30)
    assert sorted(done) == sorted(calls)
    assert [name for name, _ in failed if name != "erase"] == []


def test_a_file_is_of_the_moment_of_its_save(tmp_path, monkeypatch) -> None:
    bank, path = make("recent"), tmp_path / "a.vmem"
    bank.push(frame(1.0), 1.0)
    write = banks.BankFile.write

    def slowly(self: banks.BankFile, to: os.PathLike) -> None:
        # as another thread may while the disk is busy
        bank.push(frame(2.0), 2.0)
        write(self, to)

    monkeypatch.setattr(banks.BankFile, "write", slowly)
    bank.save(path)
    assert banks.load(path)[0].read().tokens.unique().tolist() == [1.0]
    assert bank.read().tokens.unique().tolist() == [1.0, 2.0]


# forked processes


def _in_child(calls: list[Callable[[], object]]) -> int:
    """What became of the calls in a forked process: 1 = some worked, 2 = some were refused by name; 9 = it hung."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 4
    try:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(9))
        signal.alarm(10)
        code = 0
        for call in calls:
            try:
                call()
                code |= 1
            except RuntimeError as error:
                code |= 2 if "forked" in str(error) else 4
    finally:
        os._exit(code)


@pytest.mark.parametrize("archived", [False, True])
def test_a_process_forked_beside_pushes_never_hangs(archived: bool) -> None:
    if archived:
        pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    bank, stop = make("recent"), threading.Event()
    if archived:
        bank.archive = banks.Archive("256KiB", block=True)

    def push() -> None:
        while not stop.is_set():
            bank.push(frame(0.0))

    calls: list[Callable[[], object]] = [lambda: bank.push(frame(1.0)), bank.read, lambda: bank.save("/dev/null/x")]
    if archived:
        calls = [lambda: bank.archive.read(0.0, 1.0), lambda: bank.push(frame(1.0)), bank.archive.counts]
    else:
        calls = calls[:2]
    thread = threading.Thread(target=push)
    thread.start()
    try:
        ended = {_in_child(calls) for _ in range(20)}
    finally:
        stop.set()
        thread.join()
    # of an archive nothing works; a memory goes on where nobody was in the middle of it
    assert ended <= ({2} if archived else {1, 2})
    bank.push(frame(2.0))


def test_a_lock_that_a_lost_thread_held_is_named(tmp_path) -> None:
    bank = make("recent")
    bank.push(frame(0.0))
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with bank.preserved():
            held.set()
            over.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    try:
        assert _in_child([lambda: bank.push(frame(1.0)), bank.read, lambda: bank.save(tmp_path / "a.vmem")]) == 2
    finally:
        over.set()
        thread.join()
    assert _in_child([lambda: bank.push(frame(1.0)), bank.read, lambda: bank.save(tmp_path / "a.vmem")]) == 1


def test_copies_have_a_lock_of_their_own() -> None:
    import copy
    import pickle

    bank = make("recent")
    for twin in (bank.fork(), copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert isinstance(twin._lock, MemoryLock)
        assert twin._lock is not bank._lock
    times = seconds(3)
    bank.push(frame(0.0).expand(3, -1, -1, -1), times)
    assert bank.counts()["seen"] == 3
