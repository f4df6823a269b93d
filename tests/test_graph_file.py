"""A graph's file: nothing acknowledged is lost, nothing forgotten is left, nobody else's file is trusted."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from vmemory.graph import Category, GraphFileError, MemoryGraph
from vmemory.graph.vectors import snapshot_path

DIM = 8
ROOT = Path(__file__).resolve().parents[1]


def vector(number: int) -> np.ndarray:
    return np.random.RandomState(number).randn(DIM).astype(np.float32)


def secret(number: int) -> str:
    return f"SECRET{number:06d}X"


def add(graph: MemoryGraph, number: int, **more: Any) -> int:
    """A memory whose every text names its number."""
    of = secret(number)
    texts = f"{of} subject", f"{of} predicate", f"{of} object"
    picture = b"\xff\xd8\xff" + of.encode() * 20
    given = {"time": float(number), "vector": vector(number), "video": f"{of} video", "picture": picture}
    return graph.add(*texts, "places", f"{of} caption", **given | more)


def filled(path: Path, count: int, **more: Any) -> MemoryGraph:
    graph = MemoryGraph(path, dim=DIM)
    with graph.batch():
        for number in range(count):
            add(graph, number, **more)
    return graph


@pytest.fixture
def small_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmemory.graph.graph.SNAPSHOT_FROM", 100)


def raw(path: Path) -> bytes:
    """All bytes of the graph's files."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()))


def traces(path: Path) -> set[int]:
    """Numbers of the memories of which a file has a text or picture."""
    return {int(number) for number in re.findall(rb"SECRET(\d{6})X", raw(path))}


def test_opening_again_gives_the_same_graph(tmp_path):
    path = tmp_path / "me.graph"
    with filled(path, 50) as graph:
        graph.search(vector(3))
        memories, stats = graph.memories(), graph.stats()
        found = graph.search(vector(7), 9, delta=-1)
        graph.expire(9, 99.0)
        visits = [memory.visits for memory in graph.memories()]
    with MemoryGraph(path) as graph:
        assert [(m.id, m.text, m.time, m.video) for m in graph.memories()] == [
            (m.id, m.text, m.time, m.video) for m in memories
        ]
        assert [m.visits for m in graph.memories()] == visits
        assert graph.memories()[8].valid_to == 99.0
        assert graph.stats().nbytes == stats.nbytes
        assert [(f.memory.id, f.score) for f in graph.search(vector(7), 9, delta=-1)] == [
            (f.memory.id, f.score) for f in found
        ]
        with pytest.raises(ValueError, match=r"time: expected at least 3\.0, the newest of video"):
            add(graph, 3, time=2.0)
        assert add(graph, 50) == 51


def test_the_snapshot_holds_most_vectors_and_may_be_damaged(tmp_path, small_snapshots):
    path = tmp_path / "me.graph"
    filled(path, 430, picture=None).close()
    copy = snapshot_path(path)
    assert copy.stat().st_size > 430 * DIM * 4
    whole = copy.read_bytes()
    at = len(whole) // 2
    damaged = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    older = None
    for contents in (whole, damaged, whole[:100], whole + b"x", b"", bytes(len(whole)), None):
        copy.unlink() if contents is None else copy.write_bytes(contents)
        with MemoryGraph(path) as graph:
            for number in (0, 200, 429):
                (found,) = graph.search(vector(number), 1, walk=0)
                assert (found.memory.id, found.score) == (number + 1, pytest.approx(1, abs=1e-6))
            newest = graph._arrays.vector[:430].copy()
        older = newest if older is None else older
        assert np.array_equal(newest, older)


def test_vectors_of_another_graph_are_not_taken(tmp_path, small_snapshots):
    for name in ("a", "b"):
        filled(tmp_path / name, 430, picture=None).close()
    shutil.copy(snapshot_path(tmp_path / "a"), snapshot_path(tmp_path / "b"))
    with MemoryGraph(tmp_path / "b") as graph:
        assert graph._unsaved >= 430 or snapshot_path(tmp_path / "b").exists()
        assert graph.search(vector(5), 1, walk=0)[0].memory.id == 6


@pytest.mark.parametrize("what", ["user", "span", "category", "node"])
def test_what_is_forgotten_is_not_in_the_files(tmp_path, what):
    path = tmp_path / "me.graph"
    graph = MemoryGraph(path, dim=DIM)
    for number in range(300):
        add(graph, number, user="anna" if number % 3 else "ben")
    for number in range(300, 310):
        add(graph, number)
    everything = raw(path)
    assert all(secret(number).encode() in everything for number in range(310))
    if what == "user":
        gone = {number for number in range(300) if number % 3}
        graph.forget(user="anna")
    elif what == "span":
        gone = {number for number in range(100, 200) if number % 3 == 0}
        graph.forget(user="ben", since=100.0, until=200.0)
    elif what == "category":
        gone = set(range(300, 310))
        graph.forget(category="places")
    else:
        gone = {305}
        graph.forget(node=f"{secret(305)} object")
    graph.settle()
    for _ in range(2):
        left = raw(path)
        assert [number for number in gone if secret(number).encode() in left] == []
        assert [
            number for number in gone if (vector(number)[1:3] / np.linalg.norm(vector(number))).tobytes() in left
        ] == []
        assert all(secret(number).encode() in left for number in set(range(310)) - gone)
        graph.close()


def test_pages_that_sqlite_rebalanced_keep_nothing(tmp_path):
    """`secure_delete` alone leaves copies in the gaps of such pages."""
    draw, path = random.Random(2), tmp_path / "me.graph"
    graph = MemoryGraph(path, dim=DIM)
    gone: set[int] = set()
    number = 0
    for _ in range(6):
        with graph.batch():
            for _ in range(draw.choice([30, 200])):
                more = {"picture": None} if draw.random() < 0.7 else {}
                add(graph, number, user=draw.choice("abc"), **more)
                number += 1
        user, since = draw.choice("abc"), draw.uniform(0, number)
        gone |= {int(m.time) for m in graph.memories(user=user, since=since)}
        graph.forget(user=user, since=since)
    graph.settle()
    assert gone
    assert traces(path) & gone == set()
    graph.close()


def test_the_snapshot_and_the_arrays_forget_too(tmp_path, small_snapshots):
    path = tmp_path / "me.graph"
    graph = filled(path, 300, picture=None)
    graph.settle()
    assert vector_bytes(7) in snapshot_path(path).read_bytes()
    graph.forget(since=7.0, until=8.0)
    graph.settle()
    assert vector_bytes(7) not in snapshot_path(path).read_bytes()
    assert not graph._arrays.vector[7].any()
    assert vector_bytes(8) in snapshot_path(path).read_bytes()
    graph.close()


def vector_bytes(number: int) -> bytes:
    one = vector(number)
    return (one / np.float32(np.sqrt(float(np.dot(one, one))))).tobytes()


def write_until_killed(path: Path, number: int, say: Callable[[str], object]) -> NoReturn:
    graph = MemoryGraph(path, dim=DIM)
    say("ready")
    while True:
        if number % 40 == 39:
            with graph.batch():
                for n in range(number, number + 3):
                    add(graph, n, video=None)
            number += 3
        elif number % 50 == 25:
            graph.forget(since=float(number - 10), until=float(number - 5))
            say(f"forgot {number - 10} {number - 5}")
            number += 1
        else:
            add(graph, number, video=None)
            number += 1
        say(f"have {number}")


def forked(work: Callable[[Callable[[str], object]], object]) -> tuple[int, Any]:
    """Run work in a forked process; its number, and what reads its lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            work(lambda line: os.write(writing, f"{line}\n".encode()))
        finally:
            os._exit(3)
    os.close(writing)
    return child, os.fdopen(reading)


def kill_often(path: Path, kills: int, seed: int) -> int:
    """Kill a writing process again and again, check that all is there that it said, and return how much that was."""
    draw, number = random.Random(seed), 0
    gone: set[int] = set()
    for _ in range(kills):
        child, lines = forked(partial(write_until_killed, path, number))
        assert lines.readline() == "ready\n"
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        for line in lines.read().splitlines():
            words = line.split()
            if words[0] == "forgot":
                gone |= set(range(int(words[1]), int(words[2])))
            else:
                number = int(words[1])
        lines.close()
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        with MemoryGraph(path) as graph:
            memories = graph.memories()
            have = {int(memory.time) for memory in memories}
            if number % 50 == 25 and number % 40 != 39 and number - 10 not in have:
                # killed between the act and the word
                gone |= set(range(number - 10, number - 5))
            said = {n for n in range(number) if n % 50 != 25} - gone
            assert said - have == set(), "acknowledged, and lost"
            assert have & gone == set(), "forgotten, and back"
            number = max([number, *(n + 1 for n in have)])
            for memory in memories:
                assert memory.caption == f"{secret(int(memory.time))} caption"
                assert memory.kept == ("nearest", "vector", "caption")
            for memory in memories[-3:]:
                assert graph.search(vector(int(memory.time)), 1, walk=0)[0].memory.id == memory.id
            graph.settle()
            assert traces(path) & gone == set(), "forgotten, and still in a file"
    return number


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path):
    assert kill_often(tmp_path / "me.graph", 6, seed=1) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_hundred_kills_lose_nothing(tmp_path):
    assert kill_often(tmp_path / "me.graph", 200, seed=2) > 1000


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_killed_while_it_erases_is_finished_at_opening(tmp_path, monkeypatch):
    path = tmp_path / "me.graph"
    filled(path, 50).close()

    def forget_and_die(_: object) -> None:
        monkeypatch.setattr("vmemory.graph.graph.erase_some", lambda *_: os._exit(9))
        graph = MemoryGraph(path)
        graph.forget(until=20.0)
        graph.settle()

    child, lines = forked(forget_and_die)
    lines.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert secret(3).encode() in raw(path)
    with MemoryGraph(path) as graph:
        assert [int(m.time) for m in graph.memories()] == list(range(20, 50))
    assert traces(path) == set(range(20, 50))


def test_one_graph_has_a_file_at_a_time(tmp_path):
    path = tmp_path / "me.graph"
    with MemoryGraph(path, dim=DIM) as graph:
        add(graph, 1)
        with pytest.raises(GraphFileError, match="in use by another process or by another graph"):
            MemoryGraph(path)
        code = f"from vmemory.graph import MemoryGraph; MemoryGraph({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.stderr.splitlines()[-1].endswith("in use by another process or by another graph of this one")
        add(graph, 2)
    assert len(MemoryGraph(path)) == 2
    # the graph above was not closed, but nobody has it
    assert len(MemoryGraph(path)) == 2


def test_a_closed_graph_says_so(tmp_path):
    graph = MemoryGraph(tmp_path / "me.graph", dim=DIM)
    graph.close()
    graph.close()
    for call in (lambda: add(graph, 1), lambda: graph.search(vector(1)), lambda: graph.memories(), graph.settle):
        with pytest.raises(RuntimeError, match="graph: expected an open one"):
            call()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_is_refused(tmp_path):
    graph = filled(tmp_path / "me.graph", 3)
    child = os.fork()
    if not child:
        code = 1
        try:
            graph.search(vector(1))
        except RuntimeError as error:
            code = 0 if "forked" in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    add(graph, 9)
    graph.close()


def other_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")


def other_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE a (b)")


def trigger(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON memory BEGIN DELETE FROM memory; END")


def sql(statement: str) -> Any:
    def run(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute(statement)

    return run


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_version, "version 2, this vmemory reads version 1"),
        (other_program, "a database, but not a memory graph"),
        (trigger, "its tables are not those of a memory graph"),
        (lambda path: path.write_bytes(b""), "an empty file, not a memory graph"),
        (lambda path: path.write_bytes(b"hello"), "not a memory graph"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "cut short, 50 bytes are left"),
        (lambda path: path.write_bytes(path.read_bytes()[:9000]), "damaged"),
        (sql("DELETE FROM about"), "no description of the graph"),
        (sql("UPDATE about SET value = '0' WHERE key = 'dim'"), "damaged"),
        (sql("UPDATE about SET value = '{' WHERE key = 'categories'"), "the description of the graph cannot be read"),
        (sql("DELETE FROM user"), "of no user"),
        (sql("DELETE FROM node WHERE id = 4"), "is no node"),
        (sql("DELETE FROM video"), "of no video"),
        (sql("UPDATE memory SET category = 99 WHERE id = 2"), "a memory of no category"),
        (sql("UPDATE memory SET vector = 31 WHERE id = 2"), "a vector of another length than 8"),
        (sql("UPDATE memory SET vector = 'a' WHERE id = 2"), "damaged"),
        (sql("UPDATE vector SET data = x'00' WHERE id = 2"), "memory 2 without its vector"),
        (sql("UPDATE vector SET data = 'a' WHERE id = 2"), "memory 2 without its vector"),
        (sql("DELETE FROM vector WHERE id = 2"), "memory 2 without its vector"),
        (sql("UPDATE vector SET data = zeroblob(32) WHERE id = 2"), "a vector whose length is not 1"),
        (sql("UPDATE memory SET caption = x'ff' WHERE id = 2"), "of another kind than its column's"),
        (sql("UPDATE memory SET caption = zeroblob(100000) WHERE id = 2"), "damaged"),
        (sql("UPDATE memory SET caption = printf('%.*c', 100000, 'x')"), "a text beyond the limit"),
        (sql("UPDATE memory SET time = 9e999 WHERE id = 2"), "a memory of no time"),
        (sql("UPDATE memory SET time = 'now' WHERE id = 2"), "damaged"),
        (sql("UPDATE memory SET visits = -1 WHERE id = 2"), "visits below 0"),
        (sql("UPDATE memory SET user = 1 << 40 WHERE id = 2"), "damaged"),
        (sql("INSERT INTO visual VALUES (4000, 'bytes', '[1]', x'00')"), "a picture of no memory"),
        (sql("INSERT INTO forgetting (what) VALUES ('{}')"), "a request to forget that cannot be read"),
    ],
)
def test_a_file_that_no_graph_wrote_is_refused_in_one_line(tmp_path, spoil, message):
    path = tmp_path / "me.graph"
    filled(path, 5).close()
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(GraphFileError, match=message) as caught:
        MemoryGraph(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    # and neither changed nor kept open
    assert path.read_bytes() == before
    with pytest.raises(GraphFileError, match=message):
        MemoryGraph(path)


def test_places_where_no_graph_can_be(tmp_path):
    with pytest.raises(GraphFileError, match="expected a file, got a folder"):
        MemoryGraph(tmp_path)
    with pytest.raises((OSError, GraphFileError)):
        MemoryGraph("/proc/me.graph")
    with pytest.raises(ValueError, match="path: expected a name without NUL"):
        MemoryGraph(tmp_path / "a\0b")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_nothing_is_stored(tmp_path):
    path = tmp_path / "me.graph"
    graph = filled(path, 20)
    before = graph.stats().nbytes
    (pages,) = graph._file.writer.execute("PRAGMA page_count").fetchone()
    graph._file.writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match=rf"{path}: database or disk is full"):
        add(graph, 20, mean=torch.ones(100, 1000))
    assert graph.stats().nbytes == before
    assert graph.forget(until=1.0) == 1
    graph.settle()
    graph._file.writer.execute("PRAGMA max_page_count = 1000000")
    assert add(graph, 20) == 21
    graph.close()
    with MemoryGraph(path) as graph:
        assert [int(m.time) for m in graph.memories()] == list(range(1, 21))


def test_another_dim_and_other_categories_than_the_files_are_refused(tmp_path):
    path = tmp_path / "me.graph"
    own = [Category("tools", "workshop", "hammers and saws")]
    MemoryGraph(path, dim=DIM, categories=own).close()
    with pytest.raises(ValueError, match="dim: expected 8, the file's, got 9"):
        MemoryGraph(path, dim=9)
    with pytest.raises(ValueError, match="categories: expected those of"):
        MemoryGraph(path, categories=[*own, Category("more", "b", "c")])
    with MemoryGraph(path) as graph:
        assert list(graph.categories) == ["tools"]


def test_flipped_bytes_never_break_out(tmp_path):
    """A damaged file opens and answers, or is refused; other errors would be faults of ours."""
    path, copy = tmp_path / "me.graph", tmp_path / "copy.graph"
    filled(path, 30).close()
    whole, draw = path.read_bytes(), random.Random(5)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 4, 30])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        for left in tmp_path.glob("copy*"):
            left.unlink()
        copy.write_bytes(data)
        graph = None
        try:
            graph = MemoryGraph(copy)
            graph.search(vector(3), 5, delta=-1)
            for memory in graph.memories():
                graph.visual(memory.id, "picture")
        except GraphFileError:
            refused += 1
        finally:
            if graph is not None:
                graph._closed = True
                graph._worker.shutdown()
                graph._file.close()
    assert 0 < refused < 60
