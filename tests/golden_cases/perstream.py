"""PerStream's memory graph: what it stores, what it retrieves, what its two reductions remove, and its gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.recordings import Case
from vmemory.graph import CATEGORIES, MemoryGraph, perstream_scores
from vmemory.graph.arrays import GRANULARITIES


class Recorded:
    """An encoder that knows the recorded texts."""

    def __init__(self, case: Case) -> None:
        self.known: dict[str, Tensor] = {}
        for id, _, label, caption, *_ in case.facts["graph"]["nodes"]:
            self.known[label] = case.tensors[f"label_{id}"][0]
            self.known[caption] = case.tensors[f"cap_{id}"][0]
        for name, vector in case.tensors.items():
            if name.startswith("q_"):
                self.known[name[2:].replace("_", " ")] = vector[0]
        self.dim = len(vector[0])

    def encode(self, texts: list[str]) -> Tensor:
        # a caption that the original drops was never embedded
        return torch.stack([self.known.get(text, torch.ones(self.dim)) for text in texts])


def check(case: Case) -> None:
    facts = case.facts
    if "memories" not in facts or "graph" not in facts:
        case.skip()
    assert [category.name for category in CATEGORIES] == facts["categories"]
    assert_stores(case, "perstream", facts["graph"])
    assert_stores(case, "perstream-duplicates", facts["graph_allow_duplicates"])
    for asked, expected in facts["queries"].items():
        assert_retrieves(case, asked, expected)
    for asked, expected in facts["reduce"].items():
        if isinstance(expected, dict):
            assert_reduces(case, asked, expected)
        else:
            assert_reduces_all(case, expected[0])
    assert_scores(case)


def filled(case: Case, rule: Any = "perstream") -> MemoryGraph:
    """The graph of the recorded memories, with visual tokens of the recorded number of values."""
    encoder = Recorded(case)
    graph = MemoryGraph(encoder=encoder)
    values = max(node[5] for node in case.facts["graph"]["nodes"])
    for time, (subject, predicate, object, caption, category) in enumerate(case.facts["memories"]):
        tokens = torch.ones(values)
        graph.add(subject, predicate, object, category, caption, time=time, mean=tokens, nearest=tokens, rule=rule)
    return graph


def assert_stores(case: Case, rule: str, expected: dict[str, Any]) -> None:
    stored = filled(case, rule).memories()
    nodes = [memory for memory in stored if memory.subject is None]
    names = {id: (label, category) for id, category, label, *_ in expected["nodes"]}
    assert [(m.category, m.object, m.caption, "vector" in m.kept) for m in nodes] == [
        (category, label, caption, has_vector) for _, category, label, caption, has_vector, _, _ in expected["nodes"]
    ]
    assert [("mean" in m.kept, "nearest" in m.kept) for m in nodes] == [
        (mean > 0, nearest > 0) for *_, mean, nearest in expected["nodes"]
    ]
    edges = [(m.subject, m.predicate, m.object) for m in stored if m.subject is not None]
    assert edges == [
        (names[begin][0], predicate, names[end][0])
        for begin, predicate, end, _ in sorted(expected["edges"], key=lambda edge: edge[3])
    ]


def assert_retrieves(case: Case, asked: str, expected: list[Any]) -> None:
    query, delta, k = asked.split("|")
    graph = filled(case)
    found = graph.search(query, int(k.removeprefix("k=")), delta=float(delta.removeprefix("delta=")), rule="perstream")
    labels = {id: (label, category) for id, category, label, *_ in case.facts["graph"]["nodes"]}
    assert [(f.memory.object, f.memory.category) for f in found] == [labels[id] for id, _, _ in expected], asked
    ours, theirs = (torch.tensor(x, dtype=torch.float64) for x in ([f.score for f in found], [s for *_, s in expected]))
    # they are recorded with six digits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert all(f.memory.visits == 1 for f in found)


def assert_reduces(case: Case, asked: str, expected: dict[str, Any]) -> None:
    rule, kib, _ = asked.split("|")
    graph = filled(case)
    counts = [expected["freq"][id] for id, *_ in case.facts["graph"]["nodes"]]
    # before anything was retrieved the original counts a visit for each of 30 days, the same for all
    visits = torch.tensor(counts) - min(counts)
    rows = [m.id - 1 for m in graph.memories() if m.subject is None]
    graph._arrays.visits[rows] = visits.numpy()
    reduced = graph.reduce(int(float(kib.removesuffix("KiB")) * 1024 + 0.5), rule=rule.lower())
    stats = expected["stats"]
    names = dict(zip(("v_nearest", "v_mean", "v_M", "M"), GRANULARITIES, strict=True))
    assert reduced.freed == round(stats["total_memory_freed_mb"] * 2**20), asked
    assert reduced.removed == {names[name]: count for name, count in stats["granularities_removed"].items()}, asked
    kept = [m for m in graph.memories() if m.subject is None]
    for memory, (_, _, label, caption, has_vector, mean, nearest) in zip(kept, expected["state"], strict=True):
        state = memory.object, "vector" in memory.kept, "mean" in memory.kept, "nearest" in memory.kept
        assert state == (label, has_vector, mean > 0, nearest > 0), asked
        assert memory.caption == (None if caption == "[REDUCED]" else caption), asked
    assert (reduced.memories if rule == "NSBG" else sum(reduced.removed.values())) == stats["nodes_modified"], asked


def assert_reduces_all(case: Case, expected: dict[str, Any]) -> None:
    """The original then counts its placeholders as bytes that can be freed again."""
    graph = filled(case)
    assert graph.reduce(2**40, rule="nsbg").freed == round(expected["total_memory_freed_mb"] * 2**20)
    assert graph.reduce(2**40, rule="nsbg").freed == 0


def assert_scores(case: Case) -> None:
    if not case.holds("gate_frames", "gate_categories", "gate_scores"):
        return
    scores = perstream_scores(case.tensors["gate_frames"], case.tensors["gate_categories"])
    torch.testing.assert_close(scores, case.tensors["gate_scores"], rtol=0, atol=1e-6)
    assert scores.argmax(1).tolist() == case.facts["gate"]["argmax"]
