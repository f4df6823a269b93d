"""What callers get wrong, and what they do to a memory in the middle of a stream, for every policy."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import resource
import stat

import pytest
import torch

from tests.memories import DIM, GRID, clip, same, seconds
from tests.test_banks import POLICIES, STORES, make
from vmemory import banks
from vmemory.reference.bank_layout import BankState

ROWS = torch.stack([clip(3), clip(3, seed=1)])


# streams and times


@pytest.mark.parametrize("policy", POLICIES)
def test_streams_that_do_not_exist_or_come_twice_are_refused(policy: str) -> None:
    bank = make(policy, streams=2)
    bank.push(ROWS, seconds(3))
    before = bank.snapshot()
    for rows, words in (([0, 2], "expected less than 2, got 2"), ([1, 1], r"expected no stream twice, got \[1, 1\]")):
        for time in (None, seconds(3) + 3):
            with pytest.raises(ValueError, match=f"streams: {words}"):
                bank.push(ROWS, time, streams=torch.tensor(rows))
        same(bank.state, before)


@pytest.mark.parametrize("policy", POLICIES)
def test_times_of_skipped_rows_are_not_looked_at(policy: str) -> None:
    bank, plain = make(policy, streams=2), make(policy, streams=2)
    for memory in (bank, plain):
        memory.push(ROWS, seconds(3))
    when = torch.stack([torch.zeros(3, dtype=torch.float64), seconds(3) + 3])
    bank.push(ROWS, when, streams=torch.tensor([-1, 1]))
    plain.push(ROWS[1:], seconds(3) + 3, streams=torch.tensor([1]))
    same(bank.state, plain.state)
    with pytest.raises(ValueError, match=r"time: expected more than 5.0 s, the last seen, got 4.0"):
        bank.push(ROWS, torch.stack([when[0], when[1] + 1]), streams=torch.tensor([-1, 1]))
    same(bank.state, plain.state)


@pytest.mark.parametrize("policy", POLICIES)
def test_times_are_finite_numbers(policy: str) -> None:
    bank = make(policy)
    for time, error, words in (
        (math.inf, ValueError, "time: expected finite seconds, or NaN where unknown, got inf"),
        (-math.inf, ValueError, "time: expected finite seconds, or NaN where unknown, got -inf"),
        ("now", TypeError, "time: expected seconds, as numbers or a float64 tensor, got 'now'"),
        ([None], TypeError, r"time: expected seconds, as numbers or a float64 tensor, got \[None\]"),
    ):
        with pytest.raises(error, match=words):
            bank.push(clip(1), time)
        with pytest.raises(error, match=words):
            bank.compress(clip(1), time)
    assert bank.counts()["seen"] == 0
    bank.push(clip(1), math.nan)
    bank.push(clip(1), 3.0)
    assert bank.counts()["seen"] == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_reset_takes_streams_there_are(policy: str) -> None:
    bank = make(policy, streams=2)
    if policy != "dual":
        pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
        bank.archive = banks.Archive("1MiB")
    bank.push(torch.stack([clip(20)] * 2), seconds(20))
    before = bank.snapshot()
    for streams, error, words in (
        ([0, 2], ValueError, "streams: expected between 0 and 1, got 2"),
        ([-1], ValueError, "streams: expected between 0 and 1, got -1"),
        (0, TypeError, "streams: expected a sequence of ints, got int"),
    ):
        with pytest.raises(error, match=words):
            bank.reset(streams)
        same(bank.state, before)
        assert policy == "dual" or bank.archive.read(0, 99).tokens.shape[0] > 0
    bank.reset(torch.tensor([1]))
    assert [bank.counts(s)["held"] > 0 for s in range(2)] == [True, False]


# dtypes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("before", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.float64, torch.bfloat16])
def test_a_memory_cast_in_the_middle_goes_on_and_is_saved(policy: str, before, after, tmp_path) -> None:
    """Descriptors narrower than what the operators read would be read past their end."""
    bank, path = make(policy, dtype=before), tmp_path / "m.vmem"
    bank.push(clip(5).to(before), seconds(5))
    bank.to(after)
    fresh = make(policy, dtype=after)
    assert [t.dtype for t in bank.buffers()] == [t.dtype for t in fresh.buffers()]
    bank.push(clip(20).to(after), seconds(20) + 5)
    assert bank.counts()["seen"] == 25
    bank.save(path)
    again, _ = banks.load(path)
    same(again.state, bank.state)
    for memory in (bank, again):
        memory.push(clip(3).to(after), seconds(3) + 25)
    same(again.state, bank.state)


@pytest.mark.parametrize("policy", ["hierarchical", "merging", "recent"])
def test_a_cast_memory_decides_as_one_that_always_was_so_wide(policy: str) -> None:
    bank, wide = make(policy), make(policy, dtype=torch.float64)
    bank.push(clip(5), seconds(5))
    wide.push(clip(5).double(), seconds(5))
    bank.double()
    for memory in (bank, wide):
        memory.push(clip(20, seed=1).double(), seconds(20) + 5)
    assert torch.equal(bank.read().source, wide.read().source)
    assert torch.equal(bank.maps, wide.maps)


@pytest.mark.parametrize("policy", STORES)
def test_a_memory_with_an_archive_keeps_its_dtype(policy: str) -> None:
    pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    bank = make(policy)
    bank.archive = banks.Archive("1MiB")
    bank.push(clip(20), seconds(20))
    before = bank.snapshot()
    with pytest.raises(ValueError, match=r"archive: expected a bank of torch.float32, got torch.bfloat16"):
        bank.to(torch.bfloat16)
    same(bank.state, before)
    bank.push(clip(3), seconds(3) + 20)
    assert bank.archive.read(0, 99).tokens.dtype == torch.float32


@pytest.mark.parametrize("policy", POLICIES)
def test_a_memory_made_on_the_meta_device_is_whole_after_a_reset(policy: str) -> None:
    bank, plain = make(policy, device="meta"), make(policy)
    bank.to_empty(device="cpu")
    for buffer in bank.buffers():
        # what was there before, whatever it is
        buffer.view(-1).view(torch.uint8).fill_(3)
    bank.load_state_dict(plain.state_dict())
    bank.reset()
    for memory in (bank, plain):
        memory.push(clip(20), seconds(20))
    same(bank.state, plain.state)
    assert torch.equal(bank.read().source, plain.read().source)
    assert torch.equal(bank.read().tokens, plain.read().tokens)


# copies


@pytest.mark.parametrize("policy", STORES)
def test_copies_and_pickles_have_no_archive(policy: str) -> None:
    pytest.importorskip("vmemory._host", reason="vmemory._host is not built")
    bank, file = make(policy), io.BytesIO()
    bank.archive = banks.Archive("1MiB")
    bank.push(clip(20), seconds(20))
    torch.save(bank, file)
    file.seek(0)
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), torch.load(file, weights_only=False)):
        assert twin.archive is None
        same(twin.state, bank.state)
        twin.push(clip(9), seconds(9) + 20)
    assert bank.counts()["seen"] == 20


def test_a_dual_memory_says_that_it_has_no_archive() -> None:
    memory = make("dual")
    memory.archive = None
    with pytest.raises(ValueError, match="archive: expected None, a dual memory has none, got object"):
        memory.archive = object()
    assert memory.archive is None


# arguments


@pytest.mark.parametrize("policy", POLICIES)
def test_grids_budgets_and_snapshots_of_another_kind_are_refused_by_name(policy: str) -> None:
    for arguments, error, words in (
        ({"grid": 4}, TypeError, r"grid: expected two ints \(H, W\), got 4"),
        ({"grid": (4.0, 6.0)}, TypeError, r"grid: expected two ints \(H, W\), got \(4.0, 6.0\)"),
        ({"grid": (4, 6, 1)}, ValueError, r"grid: expected \(H, W\), both at least 1, got \(4, 6, 1\)"),
    ):
        with pytest.raises(error, match=words):
            make(policy, **arguments)
    for budget, words in (("1" + 400 * "0", "expected a positive size below"), (1, "expected at least")):
        with pytest.raises(ValueError, match=f"budget: {words}"):
            banks.build_memory(policy, dim=DIM, grid=GRID, budget=budget)
    bank = make(policy)
    own, other = ("DualState", "BankState") if policy == "dual" else ("BankState", "DualState")
    for snapshot, got in ((None, "NoneType"), (tuple(bank.state), "tuple"), ({}, "dict")):
        with pytest.raises(ValueError, match=f"snapshot: expected {own}, got {got}"):
            bank.restore(snapshot)
    stranger = make("recent" if policy == "dual" else "dual").snapshot()
    assert isinstance(stranger, BankState) == (policy == "dual")
    with pytest.raises(ValueError, match=f"snapshot: expected {own}, got {other}"):
        bank.restore(stranger)


# files


@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_that_says_what_no_memory_is_like_is_refused(policy: str, tmp_path) -> None:
    """Its checksum is right: somebody, or another program, wrote it so."""
    path, bank = tmp_path / "m.vmem", make(policy)
    bank.push(clip(20), seconds(20))
    bank.save(path)
    banks.load(path)
    counters, lists = ("written", "entered") if policy == "dual" else ("counter", "order")
    for change, words in (
        (lambda file: file.config.pop("dim"), "'dim'"),
        (lambda file: file.config.update(more=1), "'more'"),
        (lambda file: file.config.update(dtype="floaty"), "floaty"),
        (lambda file: file.state.pop("clock"), "state: expected .*clock"),
        (lambda file: file.state.update(clock=file.state["clock"][..., :1]), "snapshot.clock: expected"),
        (lambda file: setattr(file, "policy", "none"), "policy: expected one of"),
        (lambda file: file.state[counters].fill_(-7), "state"),
        (lambda file: file.state[lists].fill_(-7), "state"),
    ):
        file = banks.BankFile.read(path)
        change(file)
        file.write(tmp_path / "other.vmem")
        with pytest.raises(banks.BankFileError, match=f"other.vmem: .*{words}"):
            banks.load(tmp_path / "other.vmem")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_disk_that_is_full_keeps_the_old_file_and_leaves_no_other(policy: str, tmp_path) -> None:
    path, bank = tmp_path / "m.vmem", make(policy)
    bank.push(clip(5), seconds(5))
    bank.save(path)
    before = path.read_bytes()
    bank.push(clip(5), seconds(5) + 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        for target in (path, tmp_path / "new.vmem"):
            with pytest.raises(OSError, match=f"{target}: .*File too large"):
                bank.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_follows_links_and_replaces_nothing_but_files(tmp_path) -> None:
    bank, path, link, pipe = make("recent"), tmp_path / "m.vmem", tmp_path / "latest", tmp_path / "pipe"
    bank.save(path)
    link.symlink_to(path)
    os.mkfifo(pipe)
    bank.push(clip(5), seconds(5))
    bank.save(link)
    assert link.is_symlink()
    same(banks.load(path)[0].state, bank.state)
    for target in (pipe, tmp_path):
        with pytest.raises(ValueError, match=f"path: expected a file or nothing there yet, got {target}$"):
            bank.save(target)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "m.vmem", "pipe"]
