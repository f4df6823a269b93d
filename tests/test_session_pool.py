"""Many sessions over one model within a number of bytes."""

from __future__ import annotations

import os
import threading

import pytest
import torch

pytest.importorskip("transformers")

from tests.attach_oracle import GREEDY
from tests.test_session import SETTINGS, chunks, question
from tests.tiny_vlms import tiny
from vmemory.session import SessionPool, VideoSession

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def test_sessions_that_waited_on_disk_go_on_as_if_they_had_not(tmp_path):
    model, inputs = tiny("qwen2_5_vl", T=24)
    pieces, (asked, _) = list(chunks(inputs, 4)), question("qwen2_5_vl", inputs)
    alone = VideoSession(model, config=SETTINGS)
    for piece in pieces:
        alone.push(**piece)
    wanted = alone.ask(input_ids=asked, **GREEDY)

    def open_session():
        return VideoSession(model, config=SETTINGS)

    size = int(alone.memory.nbytes)
    pool = SessionPool(open_session, 2 * size, tmp_path)
    names = ["a", "b/c", "d", "e"]
    for piece in pieces:
        for name in names:
            pool[name].push(**piece)
            # the one asked for comes on top, until the next is
            assert pool.nbytes <= 3 * size
    assert set(pool) < set(names)
    for name in names:
        out = pool[name].ask(input_ids=asked, **GREEDY)
        assert torch.equal(out.sequences, wanted.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, wanted.logits, strict=True))
    pool.close()
    later = SessionPool(open_session, 2 * size, tmp_path)
    assert all(name in later for name in names)
    assert torch.equal(later["d"].ask(input_ids=asked, **GREEDY).sequences, wanted.sequences)
    later.drop("d")
    assert "d" not in later


def test_ten_thousand_frames_leave_no_bytes_behind():
    from resource import RUSAGE_SELF, getrusage

    model, inputs = tiny("qwen2_5_vl", T=50)
    session = VideoSession(model, config=SETTINGS)
    piece, resident = next(chunks(inputs, 50)), []
    piece["video_grid_thw"] = inputs["video_grid_thw"]
    piece["pixel_values_videos"] = inputs["pixel_values_videos"]
    held = set()
    for _ in range(200):
        session.push(**piece)
        held.add((session.nbytes, session.num_tokens))
        resident.append(getrusage(RUSAGE_SELF).ru_maxrss)
    assert session.memory.counts()["seen"] == 10_000
    assert len(held) == 1
    # kilobytes; the first pushes warm torch's allocator up
    assert resident[-1] - resident[20] < 4096


def film(frames: int) -> torch.Tensor:
    return torch.randint(0, 255, (frames, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def open_session():
    model, _ = tiny("qwen2_5_vl", T=24)
    return lambda: VideoSession(model, config={"memory_policy": "recent", "memory_capacities": 8})


@pytest.mark.parametrize("how", ["erase", "reset"])
def test_what_is_erased_or_reset_is_so_on_disk_too(how: str, open_session, tmp_path) -> None:
    pool = SessionPool(open_session, 1, tmp_path)
    pool["door"].push(film(8))
    pool["yard"].push(film(4))
    assert sorted(path.name for path in tmp_path.glob("*.vmem")) == ["door.vmem"]
    door, left = pool["door"], 0
    if how == "erase":
        door.erase(0.0, 3.0)
        left = door.num_tokens
        assert left > 0
    else:
        door.reset()
    # as after a kill: nobody has closed the first
    pool._release()
    again = SessionPool(open_session, 1, tmp_path)
    assert again["door"].num_tokens == left
    assert "yard" in again


def test_a_disk_that_fails_an_erase_keeps_nothing_of_the_span(open_session, tmp_path, monkeypatch) -> None:
    pool = SessionPool(open_session, 1, tmp_path)
    pool["door"].push(film(8))
    pool["yard"].push(film(4))
    door = pool["door"]

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        door.erase(0.0, 3.0)
    assert not (tmp_path / "door.vmem").exists()
    assert door.held.time.min() > 3.0


def test_a_folder_has_one_pool(open_session, tmp_path) -> None:
    pool = SessionPool(open_session, "1GiB", tmp_path)
    with pytest.raises(RuntimeError, match="folder: expected one that no other pool has"):
        SessionPool(open_session, "1GiB", tmp_path)
    pool["a"].push(film(2))
    pool.close()
    with pytest.raises(RuntimeError, match="pool: expected one in use, got one that was closed"):
        pool["a"]
    later = SessionPool(open_session, "1GiB", tmp_path)
    assert later["a"].memory.counts()["seen"] == 1
    # one that nobody closed and nobody has
    del later
    assert "a" in SessionPool(open_session, "1GiB", tmp_path)


NAMES = [
    "你" * 27, "x" * 1000, "x" * 1001, "../../x", "/etc/passwd", "..", ".", "", ".pool", "a\0b", "\ud800", "\udcff",
    "a+b", "A", "a", "%61", " ", "é", "e\u0301",
]  # fmt: skip


def test_any_string_is_a_name_and_none_blocks_another(open_session, tmp_path) -> None:
    pool = SessionPool(open_session, 1, tmp_path)
    for i, name in enumerate(NAMES):
        pool[name].push(film(2 + 2 * (i % 3)))
    for i, name in enumerate(NAMES):
        assert name in pool
        assert pool[name].memory.counts()["seen"] == 1 + i % 3, ascii(name)
    pool.close()
    # all of them in the folder, and nothing beside them
    assert len(list(tmp_path.iterdir())) == len(NAMES) + 1
    again = SessionPool(open_session, 1, tmp_path)
    assert all(again[name].num_tokens for name in NAMES)
    again.drop(NAMES[0])
    assert NAMES[0] not in again
    for name in (5, None, b"a", ("a",)):
        for use in (again.__getitem__, again.__contains__, again.drop):
            with pytest.raises(TypeError, match="name: expected a string"):
                use(name)


def test_a_session_that_left_takes_no_frames_and_says_so(open_session, tmp_path) -> None:
    pool = SessionPool(open_session, 1, tmp_path)
    door = pool["door"]
    door.push(film(4))
    pool["yard"].push(film(2))
    for use in (
        lambda: door.push(film(2)),
        lambda: door.ask("What?"),
        lambda: door.save(tmp_path / "x.vmem"),
        lambda: door.erase(0.0, 1.0),
        door.reset,
    ):
        with pytest.raises(
            RuntimeError, match="session: expected one in use, got one that waits on disk; ask its pool"
        ):
            use()
    assert pool["door"].memory.counts()["seen"] == 2
    pool.drop("door")
    assert not pool["door"].num_tokens


def test_temporaries_of_killed_pools_go_with_the_next(open_session, tmp_path) -> None:
    from vmemory._files import replacing

    child = os.fork()
    if child == 0:
        with replacing(tmp_path / "door.vmem") as partial:
            partial.write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / ".mine").touch()
    assert len(list(tmp_path.iterdir())) == 2
    pool = SessionPool(open_session, 1, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine", ".pool"}
    pool.close()


def test_several_threads_ask_one_pool(open_session, tmp_path) -> None:
    pool, frames, left, lost = SessionPool(open_session, 1, tmp_path), film(2), [], []

    def watch(name: str) -> None:
        done = 0
        while done < 6:
            try:
                pool[name].push(frames)
                done += 1
            except RuntimeError as error:
                # another thread's session took its place meanwhile
                left.append(str(error))
            except BaseException as error:
                lost.append(repr(error))
                return

    threads = [threading.Thread(target=watch, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert lost == []
    assert all("waits on disk" in words for words in left)
    assert [pool[name].memory.counts()["seen"] for name in "abc"] == [6, 6, 6]


def test_frames_come_in_while_a_session_is_saved_asked_and_erased(open_session, tmp_path) -> None:
    session, path, failed = open_session(), tmp_path / "a.vmem", []
    session.push(film(2))

    def run(call) -> None:
        try:
            for _ in range(8):
                call()
        except BaseException as error:
            failed.append(error)

    ids = torch.tensor([[3, 4, session.adapter.placeholder_id(session.model), 5]])
    calls = (
        lambda: session.push(film(2)), lambda: session.push(film(2)),
        lambda: (session.save(path), open_session().resume(path)),
        lambda: session.ask(input_ids=ids, max_new_tokens=2, do_sample=False),
        lambda: session.erase(1e6, 1e7), lambda: session.held,
    )  # fmt: skip
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    assert session.memory.counts()["seen"] == 17
