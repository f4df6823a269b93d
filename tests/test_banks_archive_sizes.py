"""Entries of several sizes in one archive: as many as fit, none torn, none of an erased one left."""

from __future__ import annotations

import struct
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.memories import kill_a_writer, seconds
from vmemory import banks
from vmemory.banks.layout import make_layout
from vmemory.reference.bank import Stream
from vmemory.reference.bank_layout import RULES, SEEN

pytest.importorskip("vmemory._host", reason="vmemory._host is not built")

DIM, GRID, GRIDS = 8, (4, 4), ((4, 4), (2, 2), (1, 1))
PAGE = 4096


def block(cells: int) -> int:
    return (128 + cells * (DIM * 4 + 4) + 63) // 64 * 64


def tiered(rule: str, intervals: tuple[int, ...] | None = None, capacities=(2, 2, 3), **arguments) -> banks.Bank:
    return banks.HierarchicalBank(DIM, GRID, capacities, GRIDS, rule, intervals=intervals, **arguments)


def video(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(frames, *GRID, DIM, generator=torch.Generator().manual_seed(seed)).cumsum(0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("intervals", [None, (8, 4, 1), (3, 2), (2,), (1,)])
def test_entries_leave_from_the_tiers_that_the_layout_names(rule: str, intervals: tuple[int, ...] | None) -> None:
    for tiers in range(4):
        for capacities in product((0, 1, 3), repeat=tiers):
            existing = sum(c > 0 for c in capacities)
            if len(intervals or ()) > tiers or (RULES[rule].victim == "both" and existing > 1):
                continue
            layout, _ = make_layout(2, GRID, capacities, (GRID,) * tiers, rule, intervals, 2)
            state = layout.new_state(1, "cpu", torch.float32)
            stream, seen = Stream(state, 0, layout), set()
            for number, mean in enumerate(torch.randn(64, 2, generator=torch.Generator().manual_seed(7))):
                assert number == int(state.counter[0, SEEN])
                mean = mean if number % 11 else mean * torch.nan
                described = mean.expand(layout.descriptors, 2)
                for slot, to in stream.push(described, 16.0, 0.0, None):
                    # a merged entry leaves as it was, into its neighbour
                    if slot >= 0 and (to < 0 or layout.tier_of[slot] == layout.tier_of[to]):
                        seen.add(layout.tier_of[slot])
            assert tuple(sorted(seen)) == layout.left, (capacities, layout.left)


@pytest.mark.parametrize(
    ("rule", "intervals", "cells"),
    [("paper", None, 1), ("paper", (8, 4, 1), 1), ("videochat-online", None, 4), ("all-pairs", None, 4)],
)
def test_a_budget_holds_as_many_entries_as_their_size_allows(rule: str, intervals, cells: int) -> None:
    bank = tiered(rule, intervals)
    bank.archive = banks.Archive(PAGE + 20 * block(cells))
    bank.push(video(60), seconds(60))
    assert bank.archive.counts() == {"held": 20, "capacity": 20, "lost": 0}
    assert bank.archive.read(0, 99).tokens.shape == (20 * cells, DIM)
    assert bank.archive.box.parts[0].shape[1] == cells


class Expected:
    """What an archive of so many blocks of one cell holds after each push: the oldest make room for what leaves."""

    def __init__(self, bank: banks.Bank, blocks: int) -> None:
        self.bank, self.blocks = bank, blocks
        self.held: dict[int, Tensor] = {}

    def push(self, frame: Tensor, time: float) -> None:
        before = self.bank.read()
        self.bank.push(frame[None], time)
        for number in sorted(set(before.frame.tolist()) - set(self.bank.read().frame.tolist())):
            new = before.tokens[before.frame == number]
            while self.blocks - sum(len(t) for t in self.held.values()) < len(new):
                del self.held[next(iter(self.held))]
            self.held[number] = new

    def check(self, bank: banks.Bank) -> None:
        found = bank.archive.read(-1, 1e6)
        assert found.frame.unique().tolist() == sorted(self.held)
        for number, tokens in self.held.items():
            assert torch.equal(found.tokens[found.frame == number], tokens)


@pytest.mark.parametrize("blocks", [4, 5, 7, 22, 41])
def test_entries_of_two_sizes_share_the_blocks(blocks: int, tmp_path) -> None:
    path, budget = tmp_path / "a.frames", PAGE + blocks * block(1)
    bank, plain = (tiered("videochat-online", (8, 4, 1)) for _ in range(2))
    bank.archive = banks.Archive(budget, path)
    expected = Expected(plain, blocks)
    for t, frame in enumerate(video(120)):
        bank.push(frame[None], float(t))
        expected.push(frame, float(t))
        if t % 5 == 0:
            expected.check(bank)
    assert {len(t) for t in expected.held.values()} == {1, 4} or blocks < 20
    assert path.stat().st_size == budget
    bank.archive.close()
    again = tiered("videochat-online", (8, 4, 1))
    again.archive = banks.Archive(budget, path)
    expected.check(again)


@pytest.mark.parametrize("torn", range(4))
def test_an_entry_with_one_torn_block_is_left_out(torn: int, tmp_path) -> None:
    path, budget = tmp_path / "a.frames", PAGE + 40 * block(1)
    bank = tiered("videochat-online", (8, 4, 1))
    bank.archive = banks.Archive(budget, path)
    bank.push(video(60), seconds(60))
    before = bank.archive.read(0, 99)
    number = next(n for n in before.frame.tolist() if (before.frame == n).sum() == 4)
    bank.archive.close()
    data = bytearray(path.read_bytes())
    headers = {at: struct.unpack_from("<8Q3d2Q", data, at) for at in range(PAGE, len(data), block(1))}
    # magic, sequence, stream, frame, first, last, frames, level, time, start, stop, part, parts
    pieces = {header[11]: at for at, header in headers.items() if header[1] > 0 and header[3] == number}
    assert sorted(pieces) == [0, 1, 2, 3]
    data[pieces[torn] + 128] ^= 1
    path.write_bytes(data)
    again = tiered("videochat-online", (8, 4, 1))
    again.archive = banks.Archive(budget, path)
    after = again.archive.read(0, 99)
    assert torch.equal(after.tokens, before.tokens[before.frame != number])
    data = path.read_bytes()
    assert not any(any(data[at : at + block(1)]) for at in pieces.values())
    # its blocks are taken again
    again.push(video(200, seed=1), seconds(200) + 100)
    assert sum(len(again.archive.read(s, s).tokens) for s in range(400)) in range(37, 41)


@pytest.mark.parametrize("blocks", [5, 9, 40])
def test_nothing_of_a_larger_entry_stays_in_the_blocks_that_it_made_free(blocks: int, tmp_path) -> None:
    path = tmp_path / "a.frames"
    bank = tiered("videochat-online", (8, 4, 1))
    bank.archive = banks.Archive(PAGE + blocks * block(1), path)
    frames = video(200)
    for t, frame in enumerate(frames):
        # of two channels the first tells the frame, whatever was pooled
        frame[..., 0] = 1000.0 + t
        bank.push(frame[None], float(t))
        if t % 7:
            continue
        bank.archive.flush()
        data, held = path.read_bytes(), set(bank.archive.read(0, 999).frame.tolist())
        there = {n for n in range(t + 1) if torch.tensor([1000.0 + n]).numpy().tobytes() in data}
        assert there == held
    bank.reset()
    assert not any(path.read_bytes()[PAGE:])


SEVERAL_SIZES = (
    "banks.HierarchicalBank(8, (4, 4), (2, 2, 3), ((4, 4), (2, 2), (1, 1)), 'videochat-online', intervals=(8, 4, 1))"
)


def test_a_writer_killed_among_the_blocks_of_an_entry_loses_that_at_most(tmp_path) -> None:
    path, budget = tmp_path / "a.frames", PAGE + 41 * block(1)
    for _ in range(2):
        kill_a_writer(SEVERAL_SIZES, path, budget, block=True)
        again = tiered("videochat-online", (8, 4, 1))
        again.archive = banks.Archive(budget, path)
        found = again.archive.read(-1, 1e9)
        assert torch.equal(found.tokens, found.frame[:, None].float().expand(-1, DIM))
        # the largest entry and what made room for it
        assert len(found.tokens) >= 41 - 2 * 4
        sizes = [int((found.frame == n).sum()) for n in found.frame.unique()]
        assert set(sizes) <= {1, 4}
        path.unlink()


def test_a_file_of_another_version_or_rule_is_refused_by_name(tmp_path) -> None:
    path, budget = tmp_path / "a.frames", "64KiB"
    bank = tiered("paper")
    bank.archive = banks.Archive(budget, path)
    bank.push(video(30), seconds(30))
    bank.archive.close()
    other = tiered("videochat-online")
    with pytest.raises(RuntimeError, match=r"expected the frames of .* evicted \[4\], got those of .* evicted \[1\]"):
        other.archive = banks.Archive(budget, path)
    data = bytearray(path.read_bytes())
    assert data[:8] == b"VEMBLCK3"
    data[7:8] = b"2"
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="an archive of version 2, this vmemory reads version 3"):
        tiered("paper").archive = banks.Archive(budget, path)
    assert path.read_bytes() == bytes(data)


def test_a_budget_too_small_for_the_largest_entry_is_refused() -> None:
    bank = tiered("videochat-online", (8, 4, 1))
    with pytest.raises(ValueError, match=f"budget: expected at least {PAGE + 4 * block(1)} bytes for one frame"):
        bank.archive = banks.Archive(PAGE + 4 * block(1) - 1)
    bank.archive = banks.Archive(PAGE + 4 * block(1))
    bank.push(video(50), seconds(50))
    assert bank.archive.counts()["held"] in range(1, 5)


def test_a_memory_of_no_entries_takes_an_archive_and_never_fills_it() -> None:
    bank = banks.RecentBank(DIM, GRID, 0)
    bank.archive = banks.Archive("64KiB")
    bank.push(video(5), seconds(5))
    assert bank.archive.counts()["held"] == 0
    assert bank.archive.read(0, 9).tokens.shape == (0, DIM)


def test_a_block_has_the_size_that_wastes_least() -> None:
    """17 cells in blocks of 16 would take two of them."""
    bank = banks.HierarchicalBank(
        DIM, (17, 1), (2, 2, 3), ((17, 1), (17, 1), (16, 1)), "videochat-online", intervals=(2, 1)
    )
    bank.archive = banks.Archive(PAGE + 10 * block(17))
    assert bank.archive.counts()["capacity"] == 10
