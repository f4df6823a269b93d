"""What leaves a memory: stored by the host within bytes, found by time, erased, and whole after a kill."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.memories import DIM, GRID, POLICIES, clip, holds, kill_a_writer, make, same, seconds, skip
from vmemory import banks

pytest.importorskip("vmemory._host", reason="vmemory._host is not built")

# a frame of these tests in a block of the store, and the store's first page
BLOCK, PAGE = 128 + 4 * 6 * (8 * 4 + 4) + 32, 4096


@pytest.mark.parametrize("policy", POLICIES)
def test_what_leaves_is_what_was_held(policy: str) -> None:
    bank, plain = make(policy, streams=2), make(policy, streams=2)
    bank.archive = banks.Archive("1MiB")
    video = torch.stack([clip(30), clip(30, seed=1)])
    left: list[dict[int, Tensor]] = [{}, {}]
    for t in range(30):
        before = [plain.read(s) for s in range(2)]
        bank.push(video[:, t : t + 1], [float(t)])
        plain.push(video[:, t : t + 1], [float(t)])
        for s in range(2):
            gone = set(before[s].frame.tolist()) - set(plain.read(s).frame.tolist())
            for number in gone:
                left[s][number] = before[s].tokens[before[s].frame == number]
    same(bank.state, plain.state)
    for s in range(2):
        found = bank.archive.read(-1, 100, stream=s)
        assert sorted(left[s]) == found.frame.unique().tolist()
        assert torch.equal(found.tokens, torch.cat([left[s][n] for n in sorted(left[s])]))
        assert bool((found.source.diff() > 0).all())
        some = bank.archive.read(5, 9, stream=s)
        assert torch.equal(some.tokens, found.tokens[(found.start <= 9) & (found.stop >= 5)])
    assert bank.archive.counts()["held"] == sum(len(n) for n in left)
    assert bank.archive.counts()["lost"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_and_skipped_streams_leave_alike(policy: str) -> None:
    one, many = make(policy, streams=2), make(policy, streams=2)
    one.archive, many.archive = banks.Archive("1MiB"), banks.Archive("1MiB")
    rows = torch.tensor([1, -1])
    many.push(clip(30).expand(2, -1, -1, -1, -1), seconds(30), streams=rows)
    for t in range(30):
        one.push(clip(30)[None, t : t + 1], [float(t)], streams=torch.tensor([1]))
    assert torch.equal(one.archive.read(0, 99, stream=1).tokens, many.archive.read(0, 99, stream=1).tokens)
    assert many.archive.read(0, 99, stream=1).tokens.shape[0] > 0
    assert many.archive.read(0, 99, stream=0).tokens.shape[0] == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["ram", "file"])
def test_every_frame_kept_repeats_the_past_under_any_policy(policy: str, where: str, tmp_path) -> None:
    bank, never = make(policy), make(policy)
    path = None if where == "ram" else tmp_path / "a.frames"
    bank.archive = banks.Archive("1MiB", path, keep="frames")
    video = clip(40)
    bank.push(video, seconds(40))
    then = make(policy)
    then.push(video[:25], seconds(25))
    same(bank.fork(24.5).state, then.state)
    never.push(video[:10], seconds(10))
    skip(never, 6)
    never.push(video[16:], seconds(40)[16:])
    bank.erase(10, 15)
    same(bank.state, never.state)
    assert bank.archive.read(0, 99).frame.unique().tolist() == [*range(10), *range(16, 40)]


@pytest.mark.parametrize("policy", ["recent", "uniform", "episodic", "reservoir"])
def test_evicted_frames_repeat_the_past_of_memories_that_do_not_reduce(policy: str) -> None:
    bank, never = make(policy), make(policy)
    bank.archive = banks.Archive("1MiB")
    bank.push(clip(40), seconds(40))
    never.push(clip(40)[:10], seconds(10))
    skip(never, 28)
    never.push(clip(40)[38:], seconds(40)[38:])
    bank.erase(10, 37)
    same(bank.state, never.state)
    # nothing of the others is lost, however differently they were evicted
    everywhere = set(bank.archive.read(0, 99).frame.tolist()) | set(bank.read().frame.tolist())
    assert everywhere == {*range(10), 38, 39}
    then = make(policy)
    then.push(clip(40)[:10], seconds(10))
    same(bank.fork(9).state, then.state)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keep", ["evicted", "frames"])
def test_no_byte_of_the_span_is_left(policy: str, keep: str, tmp_path) -> None:
    bank, path = make(policy), tmp_path / "a.frames"
    bank.archive = banks.Archive("256KiB", path, keep=keep)
    video = clip(40)
    video[20:] = 1234.0625
    pattern = torch.tensor([1234.0625]).numpy().tobytes()
    bank.push(video, seconds(40))
    bank.archive.flush()
    assert pattern in path.read_bytes()
    bank.erase(20, 39)
    bank.archive.flush()
    everything = [*bank.buffers(), *bank.archive.box.frames()]
    assert not holds(pattern, everything)
    assert pattern not in path.read_bytes()
    assert not bool((bank.archive.read(0, 99).start >= 20).any())


def test_the_oldest_leave_when_the_budget_is_full(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make("recent")
    bank.archive = banks.Archive(PAGE + 5 * BLOCK, path)
    bank.push(clip(40), seconds(40))
    assert bank.archive.counts() == {"held": 5, "capacity": 5, "lost": 0}
    assert bank.archive.read(0, 99).frame.unique().tolist() == [29, 30, 31, 32, 33]
    assert path.stat().st_size <= PAGE + 5 * BLOCK
    with pytest.raises(ValueError, match="budget: expected at least"):
        make("recent").archive = banks.Archive(100)


def test_a_full_outbox_drops_and_counts_or_waits_on_request() -> None:
    for block, lost in ((False, 11), (True, 0)):
        bank = make("recent")
        bank.archive = banks.Archive("1MiB", keep="frames", outbox=3, block=block)
        box = bank.archive.box
        for number in range(14):
            frame = torch.full((1, 1, *GRID, DIM), float(number))
            box.add_frames(bank.state, frame, torch.tensor([[0.5]], dtype=torch.float64), None, None)
            if block:
                bank.archive.pushed(1)
        bank.archive.drain()
        assert bank.archive.counts()["lost"] == lost


@pytest.mark.parametrize("policy", POLICIES)
def test_preserved_pushes_leave_nothing_behind(policy: str) -> None:
    bank = make(policy)
    bank.archive = banks.Archive("1MiB")
    bank.push(clip(20), seconds(20))
    before = bank.archive.read(0, 99).tokens
    with bank.preserved():
        bank.push(clip(20, seed=1), seconds(20) + 20)
    assert torch.equal(bank.archive.read(0, 99).tokens, before)
    assert not any(t.any() for t in bank.archive.box.frames())


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_pushes_fill_the_outbox(policy: str) -> None:
    eager, bank = make(policy), make(policy)
    eager.archive, bank.archive = banks.Archive("1MiB"), banks.Archive("1MiB")
    push = torch.compile(lambda frames, time: bank.push(frames, time), fullgraph=True, backend="aot_eager")
    for t in range(15):
        eager.push(clip(15)[t : t + 1], seconds(15)[t : t + 1])
        push(clip(15)[t : t + 1], seconds(15)[t : t + 1])
    assert int(bank.archive.box.count[0]) > 0
    assert torch.equal(bank.archive.read(0, 99).tokens, eager.archive.read(0, 99).tokens)


def test_a_file_is_opened_again_and_belongs_to_one_bank(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make("recent")
    bank.archive = banks.Archive("64KiB", path)
    bank.push(clip(20), seconds(20))
    found = bank.archive.read(3, 9)
    with pytest.raises(RuntimeError, match="another archive has this file open"):
        make("recent").archive = banks.Archive("64KiB", path)
    with pytest.raises(ValueError, match="expected one that no bank has yet"):
        make("recent").archive = bank.archive
    bank.archive.close()
    again = make("recent")
    again.archive = banks.Archive("64KiB", path)
    assert torch.equal(again.archive.read(3, 9).tokens, found.tokens)
    again.archive.close()
    with pytest.raises(RuntimeError, match="expected an archive of"):
        make("recent").archive = banks.Archive("128KiB", path)
    path.write_bytes(b"\x01" * path.stat().st_size)
    with pytest.raises(RuntimeError, match="not an archive"):
        make("recent").archive = banks.Archive("64KiB", path)


def test_a_torn_block_is_left_out(tmp_path) -> None:
    path, bank = tmp_path / "a.frames", make("recent")
    bank.archive = banks.Archive("64KiB", path)
    bank.push(clip(20), seconds(20))
    bank.archive.close()
    data = bytearray(path.read_bytes())
    at = data.index(clip(20)[4].numpy().tobytes()[:64])
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    again = make("recent")
    again.archive = banks.Archive("64KiB", path)
    assert again.archive.read(0, 99).frame.unique().tolist() == [n for n in range(14) if n != 4]


def test_a_killed_writer_loses_the_last_block_at_most(tmp_path) -> None:
    path, budget = tmp_path / "a.frames", 64 * 1024
    kill_a_writer("banks.RecentBank(8, (4, 6), 6)", path, budget)
    again = make("recent")
    again.archive = banks.Archive(budget, path)
    found = again.archive.read(-1, 1e9)
    numbers = found.frame.unique()
    capacity = again.archive.counts()["capacity"]
    assert capacity - 1 <= len(numbers) <= capacity
    assert bool((numbers.diff() == 1).all())
    assert torch.equal(found.tokens, found.frame[:, None].float().expand(-1, DIM))


def test_errors_name_what_is_wrong() -> None:
    bank = make("recent")
    for call, error, words in (
        (lambda: banks.Archive(keep="some"), ValueError, "keep: expected one of"),
        (lambda: banks.Archive(outbox=0), ValueError, "outbox: expected at least 1"),
        (lambda: banks.Archive("much"), ValueError, "budget: expected a size"),
    ):
        with pytest.raises(error, match=words):
            call()
    bank.archive = banks.Archive("1MiB")
    with pytest.raises(ValueError, match="t0: expected at most t1"):
        bank.archive.read(2, 1)
    with pytest.raises(ValueError, match="stream: expected between 0 and 0"):
        bank.archive.read(0, 1, stream=1)
    bank.push(clip(7))
    bank.push(clip(6, seed=1), seconds(6))
    before = bank.snapshot()
    with pytest.raises(ValueError, match="expected an archive whose frames all came with a time, got 7 entries"):
        bank.erase(0, 1)
    same(bank.state, before)
    assert bank.archive.counts()["held"] == 7
