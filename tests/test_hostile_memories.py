"""`.vmem` files that no memory wrote are refused in one line, before anything is allocated; the others work."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import time
from contextlib import suppress

import pytest
import torch

from tests.hostile import mutate, nested, write_raw
from tests.memories import clip, make, same, seconds
from vmemory import banks
from vmemory._files import replacing

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "hierarchical": {}, "all-pairs": {"rule": "all-pairs"}, "merging": {}, "merging-int8": {"dtype": "int8"},
    "uniform": {}, "recent": {}, "recent-int4": {"dtype": "int4"}, "episodic": {}, "reservoir": {}, "dual": {},
}  # fmt: skip


def memory(kind: str, frames: int = 9):
    policy = "hierarchical" if kind == "all-pairs" else kind.partition("-")[0]
    if policy == "dual":
        made = banks.DualMemory(8, (4, 6), (2, 3), heads=2, hidden=8)
    else:
        made = make(policy, 7, **KINDS[kind])
    made.push(clip(frames), seconds(frames))
    return made


def use(path) -> None:
    loaded, _ = banks.load(path)
    loaded.counts(), loaded.read(), loaded.entries()
    S, frames = loaded.streams, clip(3)
    frames = (
        frames.to(banks.quantization.dtype_of(loaded.to_dict()["dtype"]))
        if "int" not in loaded.to_dict()["dtype"]
        else frames
    )
    shape = loaded.grid if isinstance(loaded, banks.DualMemory) else loaded.layout.grid
    dim = loaded.dim if isinstance(loaded, banks.DualMemory) else loaded.layout.dim
    frames = frames.new_ones(S, 3, *shape, dim)
    loaded.push(frames)
    loaded.read(), loaded.search(torch.ones(2, dim), 3)
    loaded.fork().push(frames)
    # times may be unknown
    with suppress(ValueError):
        loaded.erase(2.0, 4.0)
    loaded.push(frames)
    loaded.save(path)
    banks.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_one_thing_changed_is_refused_or_works(kind: str, tmp_path, monkeypatch) -> None:
    # what is tried here need not outlive the machine
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    rng, path = random.Random(kind), tmp_path / "a.vmem"
    file, refused = memory(kind).to_file(notes={"a": 1}), []
    for _ in range(40):
        forged = copy.deepcopy(file)
        what = mutate(forged, rng)
        forged.write(path)
        try:
            use(path)
        except banks.BankFileError as error:
            refused.append(str(error))
        except Exception as error:
            raise AssertionError(f"{kind}: {what}") from error
    assert len(refused) > 10
    assert all(words.startswith(f"{path}: ") and "\n" not in words for words in refused)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [0, 1, 5, 40])
def test_what_a_memory_says_of_itself_is_taken_back(kind: str, frames: int, tmp_path) -> None:
    bank = memory(kind, frames)
    bank.save(tmp_path / "a.vmem")
    loaded, _ = banks.load(tmp_path / "a.vmem")
    same(loaded.state, bank.state)
    bank.restore(loaded.snapshot())
    if frames:
        bank.erase(1.0, 3.0)
        bank.restore(bank.snapshot())
        bank.push(clip(2), seconds(2) + 100)
        bank.restore(bank.snapshot())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 3_000_000),
        ("capacity", 20_000_000),
        ("streams", 1_000_000),
        ("capacity", 2**60),
        ("dim", 2**61),
        ("streams", 2**62),
        ("grid", [100_000, 1]),
        ("grid", [2**40, 2**40]),
        ("grid", [8192, 8192]),
        ("grid_size", [4, 5]),
    ],
)
def test_what_a_small_file_says_is_large_is_not_allocated(name: str, value, tmp_path) -> None:
    file, path = memory("merging").to_file(), tmp_path / "a.vmem"
    file.config[name] = value
    file.write(path)
    assert path.stat().st_size < 50_000
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(banks.BankFileError, match=r"config|snapshot"):
        banks.load(path)
    # kilobytes, and seconds of this process
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.process_time() - started < 5


def test_metadata_that_is_no_metadata_is_refused(tmp_path) -> None:
    path, bank = tmp_path / "a.vmem", memory("recent")
    tensors = {f"state.{name}": x for name, x in bank.snapshot()._asdict().items()}
    good = {"format": "vmem", "version": "1", "policy": "recent", "config": json.dumps(bank.to_dict()), "notes": "{}"}
    write_raw(path, good, tensors)
    banks.load(path)
    for name in good:
        for text in (
            None,
            "",
            "null",
            "[]",
            "3",
            "\0",
            "1" * 5000,
            "NaN",
            nested(100_000),
            '{"dim": 1e999}',
            "recent\n",
        ):
            header = {**good, name: text} if text is not None else {k: v for k, v in good.items() if k != name}
            write_raw(path, header, tensors)
            if (name, text) == ("notes", '{"dim": 1e999}'):
                assert banks.load(path)[1].notes == {"dim": float("inf")}
                continue
            with pytest.raises(banks.BankFileError, match=r"^[^\n]*$"):
                banks.load(path)
    for name in ("bogus.y", "state", "", "state.more", "state.state.entry"):
        write_raw(path, good, {**tensors, name: torch.zeros(1)})
        with pytest.raises(banks.BankFileError, match="state"):
            banks.load(path)
    # an argument of the constructor that no file holds
    write_raw(path, {**good, "config": json.dumps({**bank.to_dict(), "adapter": "x"})}, tensors)
    with pytest.raises(banks.BankFileError, match="config: expected"):
        banks.load(path)


def test_files_that_are_cut_short_or_no_files(tmp_path) -> None:
    path = tmp_path / "a.vmem"
    memory("recent").save(path)
    whole = path.read_bytes()
    for n in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(banks.BankFileError, match=r"not a whole \.vmem file"):
            banks.load(path)
    path.write_bytes(whole)
    loaded, file = banks.load(path)
    # nothing that was loaded lies in the file: whoever cuts it short hurts nobody
    os.truncate(path, 0)
    loaded.read(), [x.sum() for x in file.state.values()]
    os.mkfifo(tmp_path / "pipe")
    for other, words in (
        (tmp_path, "folder"),
        (tmp_path / "pipe", "pipe"),
        ("/dev/zero", "device"),
        ("a\0b", "no such file"),
    ):
        with pytest.raises(banks.BankFileError, match=words):
            banks.load(other)
    with pytest.raises(ValueError, match="path: expected a name without NUL"):
        memory("recent").save("a\0b")


def test_snapshots_that_no_memory_has_are_refused() -> None:
    bank = memory("hierarchical")
    before = bank.snapshot()
    for name, place, value in (
        ("order", (0, 0), -1), ("order", (0, 0), 2**40), ("order", (0, 1), 0), ("counter", (0, 3), -5),
        ("counter", (0, 3), 100), ("counter", (0, 0), 2**62), ("counter", (0, 1), 8), ("entry", (0, 0, 0), -1),
        ("entry", (0, 0, 0), 2**62), ("entry", (0, 0, 3), 0), ("clock", (0, 0, 1), float("inf")),
        ("clock", (0, 0, 3), float("nan")), ("mass", (0, 0), float("nan")), ("mass", (0, 0), -1.0),
    ):  # fmt: skip
        forged = bank.snapshot()
        getattr(forged, name)[place] = value
        with pytest.raises(
            ValueError, match=f"state.{'order|state.entry|state.counter' if name == 'counter' else name}"
        ):
            bank.restore(forged)
        same(bank.state, before)


# temporaries


def test_what_killed_writers_left_goes_with_the_next_open(tmp_path) -> None:
    path, others = (
        tmp_path / "a.vmem",
        [tmp_path / ".a.vmem.original", tmp_path / ".b.vmem.x", tmp_path / "a.vmem.part"],
    )
    for other in others:
        other.write_bytes(b"mine")
    bank = memory("recent")
    for reopen in (lambda: bank.save(path), lambda: banks.load(path)):
        bank.save(path)
        child = os.fork()
        if child == 0:
            with replacing(path) as partial:
                partial.write_bytes(b"half")
                os._exit(0)
        os.waitpid(child, 0)
        assert len(list(tmp_path.iterdir())) == len(others) + 2
        reopen()
        assert set(tmp_path.iterdir()) == {path, *others}
    # a writer that lives keeps its own
    with replacing(path) as partial:
        partial.write_bytes(b"half")
        bank.save(path)
        banks.load(path)
        assert partial.exists()
    assert path.read_bytes() == b"half"


def test_names_as_long_as_files_can_have_are_written(tmp_path) -> None:
    path = tmp_path / ("ä" * 125 + ".vmem")
    memory("recent").save(path)
    banks.load(path)


def test_file_and_folder_are_brought_to_disk(tmp_path, monkeypatch) -> None:
    synced, sync = [], os.fsync

    def noted(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    memory("recent").save(tmp_path / "a.vmem")
    assert synced[0].startswith(f"{tmp_path}/.")
    assert synced[1] == str(tmp_path)
