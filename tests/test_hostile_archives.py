"""Archives that somebody else wrote, damaged, cut short or removed: an error or a smaller archive, never a signal."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.hostile import PAGE, ArchiveFile, mutate_archive
from vmemory import banks

pytest.importorskip("vmemory._host", reason="vmemory._host is not built")

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET, DIM = "12KiB", 8
KINDS = {
    "recent": lambda: banks.RecentBank(DIM, (2, 2), 2),
    "int8": lambda: banks.MergingBank(DIM, (2, 2), 2, dtype="int8"),
    "hierarchical": lambda: banks.HierarchicalBank(DIM, (4, 4), (2, 2, 2)),
    "sizes": lambda: banks.HierarchicalBank(DIM, (4, 4), (2, 2, 3), rule="videochat-online", intervals=(8, 4, 1)),
}


def pushed(bank: banks.Bank, frames: int, first: float = 0.0) -> None:
    grid = bank.layout.grid
    bank.push(torch.full((frames, *grid, DIM), 7.0), first + torch.arange(frames, dtype=torch.float64))


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """A whole archive of each kind, closed."""
    folder, made = tmp_path_factory.mktemp("archives"), {}
    for kind, make in KINDS.items():
        bank, made[kind] = make(), folder / kind
        bank.archive = banks.Archive(BUDGET, made[kind])
        pushed(bank, 60)
        bank.archive.close()
    return made


def copied(archives: dict[str, Path], kind: str, tmp_path: Path) -> ArchiveFile:
    path = tmp_path / "a.frames"
    path.write_bytes(archives[kind].read_bytes())
    return ArchiveFile(path)


def opened(kind: str, path: Path) -> banks.Bank:
    bank = KINDS[kind]()
    bank.archive = banks.Archive(BUDGET, path)
    return bank


def refilled(bank: banks.Bank) -> banks.MemoryTokens:
    """More frames than an archive holds, and what it gives back of them."""
    for first in (1000.0, 2000.0):
        pushed(bank, 40, first)
    return bank.archive.read(1000.0, 1e9)


@cache
def wanted(kind: str) -> banks.MemoryTokens:
    bank = KINDS[kind]()
    bank.archive = banks.Archive(BUDGET)
    return refilled(bank)


def assert_works(kind: str, path: Path) -> None:
    """What the archive of this file takes in and gives back afterwards is what any other would."""
    bank = opened(kind, path)
    bank.archive.read(-1e300, 1e300)
    found = refilled(bank)
    assert torch.equal(found.source, wanted(kind).source)
    assert torch.equal(found.tokens, wanted(kind).tokens)
    bank.archive.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_forged_archive_is_refused_or_has_all_its_room(kind: str, archives, tmp_path) -> None:
    rng, tiers = random.Random(kind), KINDS[kind]().layout.tiers
    refused, worked = [], 0
    for _ in range(25):
        file = copied(archives, kind, tmp_path)
        how = mutate_archive(file, tiers, rng)
        try:
            assert_works(kind, file.path)
            worked += 1
        except RuntimeError as error:
            refused.append(str(error))
            assert how in ("cut", "grow", "page", "flip", "zero"), how
    assert refused
    assert worked > 5
    assert all(words.startswith(f"{file.path}: ") and "\n" not in words for words in refused)


def test_blocks_that_share_a_number_do_not_hang_a_push(archives, tmp_path) -> None:
    file = copied(archives, "sizes", tmp_path)
    file.sealed(lambda place: 7, [0, 1, 1, 1, 1, 2])
    file.write()
    assert_works("sizes", file.path)


@pytest.mark.parametrize("sequence", [0, 2**48, 2**62, 2**63, 2**64 - 1])
def test_blocks_of_impossible_numbers_leave(sequence: int, archives, tmp_path) -> None:
    file = copied(archives, "recent", tmp_path)
    file.sealed(lambda place: sequence - place if sequence else 0, [0, 1, 1, 1, 1, 0])
    file.write()
    bank = opened("recent", file.path)
    assert bank.archive.counts()["held"] == sum(0 < sequence - place < 2**48 for place in range(file.count))
    bank.archive.close()
    assert_works("recent", file.path)


@pytest.mark.parametrize(
    ("numbers", "clock"),
    [
        ([-1, 1, 1, 1, 1, 0], [1.0] * 3),
        ([0, 2**62, 1, 2**62, 1, 0], [1.0] * 3),
        ([0, 1, 2, 1, 1, 0], [1.0] * 3),
        ([0, 1, 1, 1, 0, 0], [1.0] * 3),
        ([0, 1, 1, 1, 5, 0], [1.0] * 3),
        ([0, 1, 1, 1, 1, 1], [1.0] * 3),
        ([0, 1, 1, 1, 1, 2**62], [1.0] * 3),
        ([0, 1, 1, 1, 1, -2], [1.0] * 3),
        ([0, 1, 1, 1, 1, 0], [1.0, 2.0, 1.0]),
        ([0, 1, 1, 1, 1, 0], [float("inf")] * 3),
    ],
)
def test_blocks_that_no_archive_writes_are_left_out(numbers: list[int], clock: list[float], archives, tmp_path) -> None:
    file = copied(archives, "recent", tmp_path)
    file.seal(3, 1000, numbers, clock)
    file.write()
    bank = opened("recent", file.path)
    assert bank.archive.counts()["held"] == file.count - 1
    bank.archive.close()
    assert not any(ArchiveFile(file.path).data[PAGE + 3 * file.stride : PAGE + 4 * file.stride])


@pytest.mark.parametrize("size", [0, 1, 79, -1])
def test_a_block_shorter_than_its_frame_gives_nothing(size: int, archives, tmp_path) -> None:
    file = copied(archives, "recent", tmp_path)
    for place in range(file.count):
        file.seal(place, 1000 + place, [0, 500, 500, 500, 1, 0], [500.0] * 3, size=size)
    file.write()
    bank = opened("recent", file.path)
    assert bank.archive.counts()["held"] == 0
    assert len(bank.archive.read(500.0, 500.0).tokens) == 0


@pytest.mark.parametrize("tag", [b"A", b"\xff", b"\x1b", b"\0"])
def test_a_first_page_without_an_end_is_shown_and_not_what_lies_behind(tag: bytes, archives, tmp_path) -> None:
    file = copied(archives, "recent", tmp_path)
    file.tag(tag * 1024)
    file.write()
    with pytest.raises(RuntimeError, match="expected the frames of") as error:
        opened("recent", file.path)
    shown = {b"A": "A" * 1024, b"\0": ""}.get(tag, "?" * 1024)
    assert str(error.value).endswith(f"got those of {shown}")


@pytest.mark.parametrize("call", ["recall", "push", "flush", "erase"])
@pytest.mark.parametrize("how", ["cut", "emptied", "removed", "replaced"])
def test_a_file_that_is_gone_while_it_is_open_is_an_error(how: str, call: str, archives, tmp_path) -> None:
    path = copied(archives, "recent", tmp_path).path
    bank = opened("recent", path)
    pushed(bank, 30, 100.0)
    bank.archive.flush()
    if how in ("cut", "emptied"):
        os.truncate(path, 0 if how == "emptied" else 5000)
    elif how == "removed":
        path.unlink()
    else:
        (tmp_path / "b").write_bytes(b"another")
        (tmp_path / "b").replace(path)
    words = r"archive: the file was (cut short|removed) while it was open"
    if call == "recall":
        if how in ("cut", "emptied"):
            with pytest.raises(RuntimeError, match=words):
                bank.archive.read(0.0, 1e9)
        else:
            assert len(bank.archive.read(0.0, 1e9).tokens)
    else:
        steps = {"push": lambda: pushed(bank, 30, 200.0), "erase": lambda: bank.erase(100.0, 105.0)}
        with pytest.raises(RuntimeError, match=words):
            # what the thread finds is said in the next call
            [step() for step in (steps.get(call, bank.archive.flush), bank.archive.flush)]
    # without it the memory goes on
    bank.archive = None
    pushed(bank, 5, 1000.0)
    assert bank.counts()["held"] == 2


def test_an_archive_closes_whatever_became_of_its_file(archives, tmp_path) -> None:
    path = copied(archives, "recent", tmp_path).path
    bank = opened("recent", path)
    path.unlink()
    with pytest.raises(RuntimeError, match="removed while it was open"):
        bank.archive.close()
    with pytest.raises(ValueError, match="archive: expected one that a bank has"):
        bank.archive.flush()
    opened("recent", path).archive.close()


def _on_a_full_disk(path: Path, results) -> None:
    """A disk that takes no byte behind the first page, as it looks to a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    bank = opened("recent", path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, resource.RLIM_INFINITY))
    said = []
    for call in (lambda: pushed(bank, 30, 100.0), bank.archive.flush, lambda: pushed(bank, 1, 200.0)):
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    bank.archive = None
    pushed(bank, 2, 300.0)
    results.put((said, bank.counts()["held"]))


def test_a_disk_that_takes_no_more_is_an_error(archives, tmp_path) -> None:
    path, forking = copied(archives, "recent", tmp_path).path, multiprocessing.get_context("fork")
    results = forking.Queue()
    process = forking.Process(target=_on_a_full_disk, args=(path, results))
    process.start()
    said, held = results.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    assert set(said) == {"archive: File too large"}
    # each call after the first that wrote
    assert len(said) >= 2
    assert held == 2


def test_holes_of_a_sparse_copy_are_filled_when_it_is_opened(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", KINDS["recent"]()
    bank.archive = banks.Archive("1MiB", path)
    pushed(bank, 8)
    bank.archive.close()
    whole = path.read_bytes()
    path.unlink()
    with path.open("wb") as copy:
        copy.truncate(len(whole))
        copy.write(whole[: 8 * PAGE])
    if path.stat().st_blocks * 512 >= len(whole):
        pytest.skip("the file system makes no holes")
    bank = KINDS["recent"]()
    bank.archive = banks.Archive("1MiB", path)
    assert path.stat().st_blocks * 512 >= len(whole)
    assert bank.archive.counts()["held"] == 6


def test_names_that_are_no_names_are_refused(tmp_path) -> None:
    for path in ("a\0b", ""):
        with pytest.raises(ValueError, match="path: expected the name of a file"):
            banks.Archive(BUDGET, path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(RuntimeError, match="expected a regular file"):
            opened("recent", Path(path))
    # a name in no encoding is one all the same
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.frames"))
    opened("recent", path).archive.close()
    assert path.exists()
    other = KINDS["int8"]()
    with pytest.raises(RuntimeError, match="expected the frames of"):
        other.archive = banks.Archive(BUDGET, path)
