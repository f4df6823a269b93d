"""An archive beside a memory that is reset, restored, stored in few bits, or erased while something fails."""

from __future__ import annotations

import resource
import stat
from pathlib import Path

import pytest
import torch

from tests.memories import DIM, GRID, POLICIES, clip, holds, make, same, seconds, skip
from vmemory import banks
from vmemory.banks import history

pytest.importorskip("vmemory._host", reason="vmemory._host is not built")

KEEP = ["evicted", "frames"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keep", KEEP)
def test_reset_forgets_the_archive_too(policy: str, keep: str, tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make(policy, streams=2)
    bank.archive = banks.Archive("1MiB", path, keep=keep)
    pattern = torch.tensor([1234.0625]).numpy().tobytes()
    video = torch.stack([clip(30), torch.full((30, *GRID, DIM), 1234.0625)])
    bank.push(video, seconds(30))
    kept = bank.archive.read(0, 99, stream=0).tokens
    assert pattern in path.read_bytes()
    bank.reset([1])
    assert bank.archive.read(0, 99, stream=1).tokens.shape[0] == 0
    assert pattern not in path.read_bytes()
    assert not holds(pattern, [*bank.buffers(), *bank.archive.box.frames()])
    assert torch.equal(bank.archive.read(0, 99, stream=0).tokens, kept)
    bank.reset()
    assert bank.archive.counts()["held"] == 0
    same(bank.state, make(policy, streams=2).state)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_past_after_a_reset_begins_there(policy: str) -> None:
    bank, then = make(policy), make(policy)
    bank.archive = banks.Archive("1MiB", keep="frames")
    bank.push(clip(40), seconds(40))
    bank.reset()
    bank.push(clip(20, seed=1), seconds(20) + 100)
    then.push(clip(20, seed=1)[:9], seconds(9) + 100)
    same(bank.fork(108.5).state, then.state)
    skip(then, 11)
    bank.erase(109, 130)
    same(bank.state, then.state)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keep", KEEP)
def test_frames_from_before_a_restore_are_not_taken_for_later_ones(policy: str, keep: str) -> None:
    """The times go on as before, so that nothing but the order of storing tells the two pasts apart."""
    bank, plain = make(policy), make(policy)
    bank.archive = banks.Archive("1MiB", keep=keep)
    bank.push(clip(10), seconds(10))
    snapshot = bank.snapshot()
    bank.push(clip(20, seed=1), seconds(20) + 10)
    gone = bank.archive.read(10, 12)
    bank.restore(snapshot)
    assert torch.equal(bank.archive.read(10, 12).tokens, gone.tokens)
    later = clip(8, seed=2)
    bank.push(later, seconds(8) + 10)
    plain.push(torch.cat([clip(10), later]), seconds(18))
    same(bank.state, plain.state)
    known = {n: frame.tokens for n, frame in history.frames_at_hand(bank, 0, all_or_none=False).items()}
    assert all(torch.equal(known[n], torch.cat([clip(10), later])[n]) for n in known)
    if keep == "frames":
        then = make(policy)
        then.push(torch.cat([clip(10), later])[:15], seconds(15))
        same(bank.fork(14).state, then.state)


def test_a_reopened_archive_knows_where_the_memory_is(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make("recent")
    bank.archive = banks.Archive("1MiB", path)
    bank.push(clip(20), seconds(20))
    bank.save(tmp_path / "m.vmem")
    bank.push(clip(20, seed=1), seconds(20) + 20)
    bank.archive.close()
    again, _ = banks.load(tmp_path / "m.vmem")
    again.archive = banks.Archive("1MiB", path)
    again.push(clip(9, seed=2), seconds(9) + 20)
    then = make("recent")
    then.push(torch.cat([clip(20), clip(9, seed=2)])[:24], seconds(24))
    same(again.fork(23).state, then.state)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_leaves_a_memory_in_few_bits_is_what_it_held(policy: str, dtype: str) -> None:
    bank, plain = make(policy, dtype=dtype, streams=2), make(policy, dtype=dtype, streams=2)
    bank.archive = banks.Archive("1MiB")
    video = torch.stack([clip(30), clip(30, seed=1)]).half()
    left: list[dict[int, torch.Tensor]] = [{}, {}]
    for t in range(30):
        before = [plain.read(s) for s in range(2)]
        for memory in (bank, plain):
            memory.push(video[:, t : t + 1], [float(t)])
        for s in range(2):
            for number in set(before[s].frame.tolist()) - set(plain.read(s).frame.tolist()):
                left[s][number] = before[s].tokens[before[s].frame == number]
    same(bank.state, plain.state)
    for s in range(2):
        found = bank.archive.read(-1, 100, stream=s)
        assert found.tokens.dtype == torch.float32
        assert sorted(left[s]) == found.frame.unique().tolist()
        assert torch.equal(found.tokens, torch.cat([left[s][n] for n in sorted(left[s])]))
    assert bank.archive.read(200, 300).tokens.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_frame_kept_in_few_bits_repeats_the_past_of_the_rounded_frames(policy: str, dtype: str) -> None:
    bank, never = make(policy, dtype=dtype), make(policy, dtype=dtype)
    bank.archive = banks.Archive("1MiB", keep="frames")
    bank.push(clip(40), seconds(40))
    rounded = bank.archive.read(0, 99).tokens.unflatten(0, (40, *GRID))
    assert float((rounded - clip(40)).abs().max()) <= 0.08 * float(clip(40).abs().max())
    then = make(policy, dtype=dtype)
    then.push(rounded[:25], seconds(25))
    same(bank.fork(24.5).state, then.state)
    never.push(rounded[:10], seconds(10))
    skip(never, 6)
    never.push(rounded[16:], seconds(40)[16:])
    assert bank.erase(10, 15) >= 0
    same(bank.state, never.state)
    assert bank.archive.read(0, 99).frame.unique().tolist() == [*range(10), *range(16, 40)]


class FailingDisk:
    """A store whose disk stops taking what is written."""

    def __init__(self, store) -> None:
        self._store = store

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def sync(self) -> None:
        raise RuntimeError("archive: No space left on device")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("call", ["erase", "reset"])
def test_where_the_disk_fails_memory_and_archive_forget_alike(policy: str, keep: str, call: str, tmp_path) -> None:
    bank, well = make(policy), make(policy)
    for memory, name in ((bank, "a"), (well, "b")):
        memory.archive = banks.Archive("1MiB", tmp_path / name, keep=keep)
        memory.push(clip(40), seconds(40))
    arguments = (10, 20) if call == "erase" else ()
    getattr(well, call)(*arguments)
    bank.archive._store = FailingDisk(bank.archive._store)
    with pytest.raises(RuntimeError, match="No space left on device"):
        getattr(bank, call)(*arguments)
    same(bank.state, well.state)
    assert torch.equal(bank.archive.read(0, 99).tokens, well.archive.read(0, 99).tokens)
    assert torch.equal(bank.archive.read(0, 99).frame, well.archive.read(0, 99).frame)


def test_an_altered_block_stops_an_erase_before_anything_changes(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make("recent")
    bank.archive = banks.Archive("64KiB", path)
    bank.push(clip(20), seconds(20))
    bank.archive.flush()
    before, held = bank.snapshot(), bank.archive.counts()["held"]
    at = path.read_bytes().index(clip(20)[4].numpy().tobytes()[:64])
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 8)
    with pytest.raises(RuntimeError, match="the checksum of frame 4 does not match"):
        bank.erase(8, 9)
    same(bank.state, before)
    assert bank.archive.counts()["held"] == held
    assert bank.archive.read(8, 9).frame.unique().tolist() == [8, 9]


def test_a_closed_archive_stops_erase_and_reset_before_anything_changes(tmp_path) -> None:
    bank = make("recent")
    bank.archive = banks.Archive("64KiB", tmp_path / "a.frames")
    bank.push(clip(20), seconds(20))
    bank.archive.close()
    before = bank.snapshot()
    for call in (lambda: bank.erase(8, 9), bank.reset, lambda: bank.push(clip(1))):
        with pytest.raises(ValueError, match="archive: expected one that a bank has"):
            call()
        same(bank.state, before)


def test_a_file_that_cannot_be_made_leaves_the_memory_without_an_archive(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make("recent")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RuntimeError, match="File too large"):
            bank.archive = banks.Archive("1MiB", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    with pytest.raises(RuntimeError, match="expected a regular file"):
        bank.archive = banks.Archive("1MiB", "/dev/full")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert bank.archive is None
    bank.push(clip(20))
