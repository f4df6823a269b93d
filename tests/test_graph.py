"""The personal memory graph: what it keeps, finds, reduces and forgets."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from vmemory.graph import CATEGORIES, Category, MemoryGraph
from vmemory.graph.arrays import Arrays, Row
from vmemory.graph.growing import Growing
from vmemory.graph.reduction import RULES
from vmemory.graph.walk import nearby

DIM = 8
JPEG = b"\xff\xd8\xff" + bytes(50)


class Words:
    """An encoder in which every word is a direction."""

    dim = DIM
    known = ("car", "keys", "tea", "snacks", "garage", "book", "cup", "office")

    def encode(self, texts: list[str]) -> torch.Tensor:
        rows = [[float(word in text.lower()) for word in self.known] for text in texts]
        return torch.tensor(rows) + 1e-3


@pytest.fixture
def graph() -> MemoryGraph:
    return MemoryGraph(encoder=Words())


def add(graph: MemoryGraph, subject: str, predicate: str, object: str, category: str = "vehicle", **more: Any) -> int:
    return graph.add(subject, predicate, object, category, f"{subject} {predicate} {object}", **{"time": 0.0} | more)


def random_graph(count: int, seed: int = 0, **more: Any) -> tuple[MemoryGraph, np.ndarray]:
    """Facts between few nodes, in all categories, a second apart."""
    draw = np.random.RandomState(seed)
    vectors = draw.randn(count, DIM).astype(np.float32)
    graph = MemoryGraph(dim=DIM, **more)
    names = [category.name for category in CATEGORIES]
    with graph.batch():
        for i in range(count):
            subject, object = (f"node {draw.randint(20)}" for _ in range(2))
            graph.add(subject, "sees", object, names[i % 5], f"memory {i}", time=float(i), vector=vectors[i])
    return graph, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def texts(found: list[Any]) -> list[str]:
    return [entry.memory.text for entry in found]


def test_there_are_34_categories_in_9_groups():
    assert len(CATEGORIES) == len({category.name for category in CATEGORIES}) == 34
    assert len({category.group for category in CATEGORIES}) == 9
    assert len({category.description for category in CATEGORIES}) == 34


def test_finds_a_fact_with_its_provenance(graph):
    id = add(
        graph, "I", "keep snacks in", "the car", time=100.0, video="walk.mp4", seconds=4.5, frame=9, valid_to=200.0,
        picture=JPEG,
    )  # fmt: skip
    add(graph, "I", "drink", "tea", "interests", time=101.0)
    (found,) = graph.search("snacks in the car")
    memory = found.memory
    assert (memory.id, memory.subject, memory.predicate, memory.object) == (id, "I", "keep snacks in", "the car")
    assert (memory.category, memory.user, memory.time, memory.valid_from, memory.valid_to) == (
        "vehicle", "me", 100.0, 100.0, 200.0,
    )  # fmt: skip
    assert (memory.video, memory.seconds, memory.frame, memory.visits) == ("walk.mp4", 4.5, 9, 1)
    assert memory.kept == ("nearest", "vector", "caption")
    assert graph.visual(id, "picture") == JPEG
    assert graph.visual(id, "mean") is None
    assert found.score == pytest.approx(1, abs=1e-2)
    assert found.via is None


def test_every_fact_about_a_label_is_kept(graph):
    for time, place in enumerate(("garage", "office", "garage")):
        add(graph, "the car", "stands at the", place, time=time)
    stats = graph.stats()
    assert (stats.memories, stats.edges, stats.nodes) == (3, 3, 3)
    assert len(graph.memories(node="The Car ")) == 3
    assert len(graph.memories(node="garage")) == 2


def test_rule_perstream_drops_a_fact_about_a_known_object(graph):
    first = add(graph, "I", "keep snacks in", "the car", rule="perstream")
    assert add(graph, "I", "wash", "the car", rule="perstream") == first
    stored = graph.memories()
    assert [memory.caption for memory in stored] == ["I", "I keep snacks in the car", None, None]
    assert [memory.predicate for memory in stored] == [None, None, "keep snacks in", "wash"]
    # labels of the same words in another order are alike
    assert add(graph, "I", "wash", "the old car", rule="perstream") == first
    assert add(graph, "I", "wash", "the old car", rule="perstream", threshold=1.1) != first


def test_scores_and_order_are_those_of_brute_force():
    graph, unit = random_graph(300)
    query = np.random.RandomState(1).randn(DIM).astype(np.float32)
    scores = unit @ (query / np.linalg.norm(query))
    found = graph.search(query, 10, delta=-1, walk=0)
    assert texts(found) == [f"memory {i}" for i in np.argsort(-scores, kind="stable")[:10]]
    np.testing.assert_allclose([entry.score for entry in found], np.sort(scores)[::-1][:10], atol=1e-6)


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({"category": "age"}, lambda m: m.category == "age"),
        ({"category": ["name", "vehicle"]}, lambda m: m.category in ("name", "vehicle")),
        ({"since": 100, "until": 200.0}, lambda m: 100 <= m.time < 200),
        ({"at": 150.0}, lambda m: m.valid_from <= 150 < m.valid_to),
        ({"category": "vehicle", "since": 250.0}, lambda m: m.category == "vehicle" and m.time >= 250),
    ],
)
def test_filters(filters, passes):
    graph, unit = random_graph(300)
    for id in range(1, 100):
        graph.expire(id, float(id))
    wanted = [memory for memory in graph.memories() if passes(memory)]
    assert [memory.id for memory in graph.memories(**filters)] == [memory.id for memory in wanted]
    found = graph.search(unit[0], 300, delta=-1, **filters)
    assert {entry.memory.id for entry in found} == {memory.id for memory in wanted}
    # the walk keeps to the filters too
    found = graph.search(unit[0], 1, delta=-1, **filters)
    assert {entry.memory.id for entry in found} <= {memory.id for memory in wanted}


def test_users_do_not_see_each_other(graph):
    add(graph, "I", "lost", "the keys", user="anna")
    add(graph, "I", "found", "the keys", user="ben")
    assert graph.search("keys") == []
    assert texts(graph.search("keys", user="anna")) == ["I lost the keys"]
    assert graph.stats().nodes == 4
    assert graph.users == ["anna", "ben"]
    assert graph.forget(user="anna") == 1
    assert graph.search("keys", user="anna") == []
    assert graph.users == ["ben"]
    assert len(graph.search("keys", user="ben")) == 1


def test_the_walk_goes_forward_along_edges(graph):
    add(graph, "I", "own", "the car")
    add(graph, "the car", "has keys in", "a drawer")
    add(graph, "a drawer", "is at the car of", "a friend")
    add(graph, "somebody", "knows the car", "I")
    found = graph.search("own the car", 1, delta=0.5)
    assert [(entry.memory.id, entry.via) for entry in found] == [(1, None), (3, 1), (2, 1)]
    assert [entry.memory.id for entry in graph.search("own the car", 1, delta=0.5, walk=1)] == [1, 2]
    assert [entry.memory.id for entry in graph.search("own the car", 1, delta=0.5, walk=0)] == [1]


def test_of_equal_captions_about_a_node_the_newest_is_found(graph):
    for time in range(30):
        add(graph, "I", "see", "the car", time=time)
        add(graph, "I", "wash", "the car", time=time)
        add(graph, "the car", "stands at the garage of", "a friend", time=time)
    found = graph.search("car", 1, delta=0.5)
    # every memory of the car has the same words, but the last is about the friend
    assert [(f.memory.object, f.memory.time, f.seen) for f in found] == [("the car", 29.0, 60), ("a friend", 29.0, 30)]
    assert [f.via for f in found] == [None, found[0].memory.id]
    assert len(graph.search("car", 5, delta=0.5, walk=0, distinct=False)) == 5
    found = graph.search("car", 5, delta=0.5, until=10.0)
    assert [(f.memory.time, f.seen) for f in found] == [(9.0, 20), (9.0, 10)]


def test_the_walk_ends_on_a_circle():
    arrays = Arrays(2)
    nodes = [arrays.add_node(i, 0, 0) for i in range(3)]
    for i in range(3):
        row = Row(i, 0, 0, nodes[i], nodes[(i + 1) % 3], -1, 0.0, 0.0, 1.0, 0, 0)
        arrays.add_row(row, (0, 0, 8, 1), np.ones(2, np.float32))
    arrays.visible = arrays.rows
    assert nearby(arrays, [0], 100) == [(1, 0), (2, 0)]


def test_nothing_remembered_is_no_answer(graph):
    assert graph.search("keys") == []
    assert graph.search("keys", rule="perstream") == []
    assert graph.memories() == []
    assert graph.forget(user="me") == 0
    assert graph.reduce(10**9).freed == 0
    assert graph.stats().memories == len(graph) == 0
    with pytest.raises(ValueError, match="category: expected one of"):
        graph.search("keys", category="pets")


def test_a_memory_expires_without_being_forgotten(graph):
    id = add(graph, "I", "own", "the car", time=10.0)
    graph.expire(id, 20.0)
    assert len(graph.search("car", at=15.0)) == 1
    assert graph.search("car", at=20.0) == []
    assert len(graph.search("car")) == 1
    with pytest.raises(ValueError, match=r"time: expected at least valid_from, 10.0, got 5.0"):
        graph.expire(id, 5.0)
    with pytest.raises(ValueError, match=r"id: expected that of a memory, got 7"):
        graph.expire(7, 5.0)


def test_visual_tokens_come_back(graph):
    mean, nearest = torch.randn(4, 4, 6), torch.randn(16, 6, dtype=torch.bfloat16)
    id = add(graph, "I", "own", "the car", mean=mean, nearest=nearest, picture=JPEG)
    assert torch.equal(graph.visual(id, "mean"), mean)
    assert torch.equal(graph.visual(id, "nearest"), nearest)
    assert graph.stats().nbytes["nearest"] == nearest.nbytes + len(JPEG)
    with pytest.raises(ValueError, match="kind: expected one of nearest, mean, picture, got 'x'"):
        graph.visual(id, "x")


def test_a_batch_is_kept_whole_or_not_at_all(graph):
    add(graph, "I", "own", "the car", time=5.0, video="a")
    before = graph.stats()

    def fails() -> None:
        with graph.batch():
            add(graph, "Anna", "reads", "a book", time=9.0, user="anna", video="b")
            add(graph, "the car", "stands at", "the garage", time=7.0, video="a")
            assert len(graph) == 1
            graph.add("I", "see", "tea", "places", " ", time=8.0)

    with pytest.raises(ValueError, match="caption"):
        fails()
    assert graph.stats() == before
    assert graph.users == ["me"]
    # neither times nor nodes of the batch are left
    add(graph, "the car", "stands at", "the office", time=6.0, video="a")
    assert graph.stats().nodes == 3
    assert texts(graph.search("garage office", delta=0.1, k=9)) == ["the car stands at the office"]
    with graph.batch():
        add(graph, "I", "drink", "tea", time=8.0)
        assert graph.search("tea") == []
        for call in (graph.settle, graph.close, lambda: graph.forget(user="me"), lambda: graph.reduce(1)):
            with pytest.raises(RuntimeError, match="expected to be called outside a batch"):
                call()
    assert len(graph.search("tea")) == 1


GOOD: dict[str, Any] = {
    "subject": "I", "predicate": "own", "object": "the car", "category": "vehicle", "caption": "I own the car",
    "time": 5.0,
}  # fmt: skip
BAD = [
    ("category", "pets", ValueError, "category: expected one of name, .*, got 'pets'"),
    ("category", 3, TypeError, "category: expected a name, got int"),
    ("caption", "", ValueError, "caption: expected words, got ''"),
    ("caption", " \n", ValueError, "caption: expected words"),
    ("caption", None, TypeError, "caption: expected a string, got NoneType"),
    ("caption", "x" * 70_000, ValueError, "caption: expected at most 65536 bytes, got 70000"),
    ("subject", "\ud800", ValueError, "subject: expected text without lone surrogates"),
    ("object", "x" * 5000, ValueError, "object: expected at most 4096 bytes"),
    ("predicate", "", ValueError, "predicate: expected words"),
    ("time", float("nan"), ValueError, "time: expected a finite number of seconds, got nan"),
    ("time", "now", TypeError, "time: expected a number of seconds, got str"),
    ("time", 4.0, ValueError, "time: expected at least 5.0, the newest of user 'me', got 4.0"),
    ("valid_to", 1.0, ValueError, "valid_to: expected at least valid_from, 5.0, got 1.0"),
    ("valid_from", float("nan"), ValueError, "valid_from"),
    ("vector", torch.zeros(DIM), ValueError, "vector: expected finite values that are not all 0"),
    ("vector", torch.full((DIM,), float("nan")), ValueError, "vector: expected finite"),
    ("vector", torch.ones(DIM + 1), ValueError, r"vector: expected 8 values \[8\], got shape \[9\]"),
    ("vector", [1.0] * DIM, TypeError, "vector: expected a tensor, got list"),
    ("mean", torch.ones(3, dtype=torch.int64), ValueError, "mean: expected tokens"),
    ("nearest", torch.ones(0, 4), ValueError, "nearest: expected tokens"),
    ("picture", b"GIF89a", ValueError, "picture: expected a JPEG, PNG or WebP file"),
    ("picture", "a.jpg", TypeError, "picture: expected the bytes"),
    ("video", "", ValueError, "video: expected words"),
    ("seconds", float("inf"), ValueError, "seconds: expected a finite number"),
    ("frame", -1, ValueError, "frame: expected 0 to"),
    ("user", " ", ValueError, "user: expected words"),
    ("rule", "newest", ValueError, "rule: expected one of keep, perstream, perstream-duplicates, got 'newest'"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD)
def test_a_bad_argument_is_named_and_nothing_is_stored(graph, name, value, kind, message):
    graph.add(**GOOD)
    before = graph.stats()
    with pytest.raises(kind, match=message):
        graph.add(**GOOD | {name: value})
    assert graph.stats() == before
    graph.add(**GOOD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.search(""), "query: expected words"),
        (lambda g: g.search("car", 0), "k: expected 1 to 1024, got 0"),
        (lambda g: g.search("car", category="pets"), "category: expected one of"),
        (lambda g: g.search("car", rule="best"), "rule: expected exact or perstream, got 'best'"),
        (lambda g: g.search("car", rule="perstream", at=1.0), "rule: expected no filters with perstream"),
        (lambda g: g.search(torch.ones(3)), r"query: expected 8 values \[8\], got shape \[3\]"),
        (lambda g: g.forget(), "forget: expected a user, node"),
        (lambda g: g.forget(category="pets"), "category: expected one of"),
        (lambda g: g.reduce(-1), "target: expected 0 to"),
        (lambda g: g.reduce(1, rule="all"), "rule: expected one of value, nsbg, gsbn, got 'all'"),
        (lambda _: MemoryGraph(dim=0), "dim: expected 1 to 65536, got 0"),
        (lambda _: MemoryGraph(categories=[]), "categories: expected 1 to 10000"),
        (lambda _: MemoryGraph(categories=[Category("a", "b", "c")] * 2), "categories: .* got 2 of 1 names"),
        (lambda _: MemoryGraph(user=""), "user: expected words"),
    ],
)
def test_bad_calls_are_told_in_one_line(graph, call, message):
    graph.add(**GOOD)
    with pytest.raises(ValueError, match=message) as caught:
        call(graph)
    assert "\n" not in str(caught.value)
    assert len(graph) == 1


def test_text_needs_an_encoder():
    graph = MemoryGraph(dim=DIM)
    with pytest.raises(ValueError, match="caption: expected a vector, or a graph with an encoder"):
        graph.add(**GOOD)
    graph.add(**GOOD, vector=torch.ones(DIM))
    with pytest.raises(ValueError, match="query: expected a vector"):
        graph.search("car")


def test_own_categories():
    graph = MemoryGraph(encoder=Words(), categories=[Category("tools", "workshop", "hammers and saws")])
    with pytest.raises(ValueError, match="category: expected one of tools, got 'vehicle'"):
        graph.add(**GOOD)
    graph.add(**GOOD | {"category": "tools"})
    assert graph.memories()[0].category == "tools"


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ({"node": "the car"}, [3, 4]),
        ({"category": "interests"}, [1, 2, 4]),
        ({"since": 2.0}, [1]),
        ({"until": 2.0}, [2, 3, 4]),
        ({"since": 2.0, "until": 4.0, "category": "vehicle"}, [1, 3, 4]),
        ({"video": "walk"}, [1, 2, 3]),
        ({"user": "me"}, []),
        ({"user": "nobody"}, [1, 2, 3, 4]),
        ({"video": "never seen"}, [1, 2, 3, 4]),
    ],
)
def test_forgets(graph, what, left):
    add(graph, "I", "own", "the car", time=1.0)
    add(graph, "the car", "stands at", "the garage", time=2.0)
    add(graph, "I", "drink", "tea", "interests", time=3.0)
    add(graph, "I", "read", "a book", "media", time=4.0, video="walk")
    assert graph.forget(**what) == 4 - len(left)
    for _ in range(2):
        assert [memory.id for memory in graph.memories()] == left
        found = graph.search("car garage tea book", 9, delta=0.1)
        assert sorted(entry.memory.id for entry in found) == left
        labels = {m.subject for m in graph.memories()} | {m.object for m in graph.memories()}
        assert graph.stats().nodes == len(labels)
        graph.settle()
    # nodes and times begin anew
    add(graph, "I", "own", "the car", time=4.0, video="walk")
    assert graph.memories()[-1].id == 5


def test_forgetting_most_of_a_large_graph_moves_the_rest_together():
    graph, unit = random_graph(12_000)
    assert graph.forget(until=9_000.0) == 9_000
    graph.settle()
    assert graph._arrays.rows == 3_000
    assert [memory.text for memory in graph.memories()] == [f"memory {i}" for i in range(9_000, 12_000)]
    for i in (9_000, 10_500, 11_999):
        assert texts(graph.search(unit[i], 1, walk=0)) == [f"memory {i}"]
    assert {m.id for m in graph.memories(node="node 3")} == {
        m.id for m in graph.memories() if "node 3" in (m.subject, m.object)
    }
    graph.add("node 3", "sees", "node 99", "age", "newest", time=20_000.0, vector=unit[0])
    assert texts(graph.search(unit[0], 1, walk=0)) == ["newest"]


def loops(rule: str, size: np.ndarray, visits: np.ndarray, target: int) -> np.ndarray:
    """PerStream's two reductions, one removal at a time."""
    removed, freed = np.zeros(size.shape, bool), 0
    cold = sorted(range(len(size)), key=lambda i: visits[i])
    order = [(n, g) for n in cold for g in range(4)] if rule == "nsbg" else [(n, g) for g in range(4) for n in cold]
    for n, g in order:
        if freed < target and size[n, g]:
            removed[n, g] = True
            freed += size[n, g]
    return removed


@pytest.mark.parametrize("rule", ["nsbg", "gsbn"])
def test_reductions_equal_loops(rule):
    draw = np.random.RandomState(3)
    for count in (0, 1, 7, 60):
        size = draw.choice([0, 5, 100], (count, 4)).astype(np.int64)
        visits = draw.randint(0, 4, count)
        for target in (0, 1, int(size.sum()) // 3, int(size.sum()), 10**9):
            expected = loops(rule, size, visits, target)
            assert np.array_equal(RULES[rule](size, visits, target), expected)


@pytest.mark.parametrize("rule", list(RULES))
def test_a_reduction_frees_its_bytes_and_keeps_facts(graph, rule):
    for time in range(20):
        tokens = torch.randn(4, 6)
        object = ("car", "tea", "book")[time % 3]
        add(graph, "I", "see", f"{object} {time}", "places", time=time, mean=tokens, nearest=tokens, picture=JPEG)
    total = sum(graph.stats().nbytes.values())
    for share in (0.3, 0.5, 0.2):
        before = sum(graph.stats().nbytes.values())
        reduced = graph.reduce(int(share * total), rule=rule)
        assert min(before, share * total) - 1 <= reduced.freed
        assert sum(graph.stats().nbytes.values()) == before - reduced.freed
    assert graph.stats().nbytes == dict.fromkeys(("nearest", "mean", "vector", "caption"), 0)
    assert [memory.text for memory in graph.memories()][:2] == ["I see car 0", "I see tea 1"]
    assert {memory.reduced for memory in graph.memories()} == {("nearest", "mean", "vector", "caption")}
    assert graph.search("car") == []
    assert graph.visual(1, "picture") is graph.visual(1, "mean") is None
    add(graph, "I", "see", "car 99", time=99.0)
    assert texts(graph.search("car")) == ["I see car 99"]


def test_an_array_grows_while_somebody_keeps_a_view():
    growing = Growing(np.float32, (100,))
    growing.array[3] = 7
    kept = growing.array[:4]
    growing.reserve(5000)
    assert len(growing.array) >= 5000
    assert (growing.array[3] == 7).all()
    assert (growing.array[4:5000] == 0).all()
    assert (kept[3] == 7).all()


def test_threads_add_search_and_forget_at_once(tmp_path):
    graph, unit = random_graph(500, path=tmp_path / "me.graph")
    errors: list[BaseException] = []

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def adding() -> None:
        for i in range(300):
            graph.add("I", "see", f"thing {i}", "notes", f"note {i}", time=1000.0 + i, vector=unit[i])

    def searching() -> None:
        for i in range(300):
            assert all(entry.memory.text for entry in graph.search(unit[i], 3))

    def forgetting() -> None:
        for i in range(0, 500, 50):
            assert graph.forget(since=float(i), until=float(i + 25)) == 25

    for thread in [guarded(work) for work in (adding, searching, forgetting, searching)]:
        thread.join(60)
    assert errors == []
    assert len(graph) == 500 + 300 - 250
    graph.close()
    with MemoryGraph(tmp_path / "me.graph") as graph:
        assert len(graph) == 550
