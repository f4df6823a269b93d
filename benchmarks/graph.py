"""Measure the memory graph beside faiss and beside PerStream's form: `python -m benchmarks.graph --nodes 10000 100000`.

Times are CPU milliseconds of one thread, so that other work on the machine does not count; rates and the times of
forgetting and opening are by the wall clock. Contestants take turns. Writes one JSON line per size.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vmemory.graph import CATEGORIES, MemoryGraph
from vmemory.graph.arrays import Arrays, Row
from vmemory.graph.file import INSERT_MEMORY, INSERT_NODE, GraphFile
from vmemory.ops import similarity_topk

DIM, K, DELTA = 384, 5, 0.3
Vectors = NDArray[np.float32]


def clustered(count: int, seed: int = 0) -> Vectors:
    """Draw unit vectors `[count, 384]` around 300 centres."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((300, DIM), np.float32)
    out = np.empty((count, DIM), np.float32)
    for begin in range(0, count, 65_536):
        size = min(65_536, count - begin)
        block = centres[draw.integers(300, size=size)] + draw.standard_normal((size, DIM), np.float32)
        out[begin : begin + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return out


def fill(path: Path, vectors: Vectors, users: int = 1) -> None:
    """Write a graph file with a memory per vector, between two thirds as many nodes, in a few statements."""
    MemoryGraph(path, dim=DIM).close()
    count, draw = len(vectors), np.random.default_rng(1)
    nodes = max(2, count * 2 // 3)
    subjects, objects = draw.integers(1, nodes // users + 1, (2, count))
    categories = draw.integers(len(CATEGORIES), size=count)
    file = GraphFile(path, {})
    with file.transaction() as writer:
        writer.executemany(
            "INSERT INTO user (name) VALUES (?)", [("me" if u == 0 else f"user {u}",) for u in range(users)]
        )
        # each user has nodes of one remainder
        writer.executemany(
            INSERT_NODE, ((i % users + 1, 0, f"node {i}", f"node {i}", None) for i in range(nodes // users * users))
        )
        writer.executemany(
            INSERT_MEMORY,
            (
                (
                    i % users + 1, int(categories[i]), int((subjects[i] - 1) * users + i % users + 1), "leads to",
                    int((objects[i] - 1) * users + i % users + 1), f"memory {i} of something that was seen then",
                    4 * DIM, float(i), float(i), float("inf"), None, None, None,
                )
                for i in range(count)
            ),
        )  # fmt: skip
        rows = ((i + 1, vectors[i].tobytes()) for i in range(count))
        writer.executemany("INSERT INTO vector VALUES (?, ?)", rows)
    file.close()


def source_form(vectors: Vectors, arrays: Arrays) -> Callable[[Vectors], list[int]]:
    """Return PerStream's retrieval as published: a cosine per node in a loop, a sort, and a walk over dictionaries."""
    nodes = {i: vectors[i : i + 1] for i in range(len(vectors))}
    first: dict[int, list[int]] = {}
    for row in range(arrays.rows):
        first.setdefault(int(arrays.subject[row]), []).append(row)
    follows = {row: first.get(int(arrays.object[row]), []) for row in range(arrays.rows)}

    def search(query: Vectors) -> list[int]:
        scores = {}
        for i, vector in nodes.items():
            product = np.dot(query, vector[0])
            scores[i] = float(product / (np.linalg.norm(query) * np.linalg.norm(vector)))
        seeds = sorted(scores.items(), key=lambda pair: pair[1], reverse=True)[:K]
        found, visited = [], set()
        for seed, score in seeds:
            if score < DELTA:
                continue
            stack = [seed]
            # the published walk has no bound; in a graph of this density it would go through most of it
            while stack and len(visited) < 256:
                node = stack.pop()
                if node in visited:
                    continue
                visited.add(node)
                if scores[node] >= DELTA:
                    found.append(node)
                stack += follows[node]
        return found

    return search


def flat(vectors: Vectors) -> Callable[[Vectors], Any] | None:
    """Return a search by faiss's flat index, None if faiss is not installed."""
    # faiss's OpenBLAS takes newer processors for a Pentium 4
    core = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    if core:
        os.environ.setdefault("OPENBLAS_CORETYPE", core)
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    return lambda query: index.search(query[None], K)


def milliseconds(
    contestants: dict[str, Callable[[Vectors], Any]], queries: Vectors, slow: int
) -> dict[str, list[float]]:
    """Time contestants in turn; `source` takes part in the first `slow` rounds only."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for turn, query in enumerate(queries):
        for name, run in contestants.items():
            if name == "source" and turn >= slow:
                continue
            begin = time.process_time_ns()
            run(query)
            spent[name].append((time.process_time_ns() - begin) / 1e6)
    return spent


def searches(graph: MemoryGraph, vectors: Vectors, rounds: int, slow: int) -> dict[str, Any]:
    """Measure searches of a filled graph."""
    rows = torch.from_numpy(vectors)[None]
    since = float(len(vectors) * 0.9)
    contestants: dict[str, Callable[[Vectors], Any]] = {
        "search and walk": lambda query: graph.search(query, K, delta=DELTA),
        "search alone": lambda query: graph.search(query, K, delta=DELTA, walk=0),
        "one category": lambda query: graph.search(query, K, delta=DELTA, category="vehicle"),
        "the last tenth": lambda query: graph.search(query, K, delta=DELTA, since=since),
        "operator": lambda query: similarity_topk(torch.from_numpy(query)[None, None], rows, K, metric="dot"),
    }
    if (other := flat(vectors)) is not None:
        contestants["faiss flat"] = other
    if slow:
        contestants["source"] = source_form(vectors, graph._arrays)
    queries = clustered(rounds + 3, seed=2)
    milliseconds(contestants, queries[:3], 1)
    spent = milliseconds(contestants, queries[3:], slow)
    result: dict[str, Any] = {}
    for name, times in spent.items():
        if times:
            result[f"{name}, p50 ms"] = float(np.percentile(times, 50))
            result[f"{name}, p99 ms"] = float(np.percentile(times, 99))
    return result


def appends(count: int = 30_000) -> float:
    """Return the microseconds of CPU that a node and a memory take in the arrays alone."""
    arrays, vector = Arrays(DIM), clustered(1)[0]
    begin = time.process_time()
    for i in range(count):
        node = arrays.add_node(i + 1, 0, 0)
        row = Row(i + 1, 0, 0, max(node - 1, 0), node, -1, float(i), float(i), float("inf"), 0, 0)
        arrays.add_row(row, (0, 0, 1536, 40), vector)
    return (time.process_time() - begin) / count * 1e6


def adds(path: Path, count: int = 3_000) -> dict[str, float]:
    """Return memories a second that a file takes, one transaction each, and in batches of 100."""
    vectors, result = clustered(2 * count), {}
    with MemoryGraph(path, dim=DIM) as graph:

        def add(i: int) -> None:
            graph.add(
                "I", "see", f"thing {i % 500}", "places", f"memory {i} of something", time=float(i), vector=vectors[i]
            )

        begin, cpu = time.perf_counter(), time.process_time()
        for i in range(count):
            add(i)
        result["durable adds a second"] = count / (time.perf_counter() - begin)
        result["durable adds a CPU second"] = count / (time.process_time() - cpu)
        begin = time.perf_counter()
        for first in range(count, 2 * count, 100):
            with graph.batch():
                for i in range(first, first + 100):
                    add(i)
        result["adds a second in batches"] = count / (time.perf_counter() - begin)
    return result


def forgets(path: Path, vectors: Vectors) -> dict[str, float]:
    """Return the milliseconds until nobody finds half of the memories, and the seconds until no file has them."""
    fill(path, vectors, users=2)
    with MemoryGraph(path) as graph:
        graph.settle()
        query = vectors[1]
        begin, cpu = time.perf_counter(), time.process_time()
        count = graph.forget(user="user 1")
        told, worked = time.perf_counter() - begin, time.process_time() - cpu
        none = graph.search(query, K, user="user 1")
        assert none == []
        graph.settle()
        return {
            "forgotten": count,
            "forgotten to the reader, ms": told * 1e3,
            "forgotten to the reader, CPU ms": worked * 1e3,
            "zeroed on disk, s": time.perf_counter() - begin,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10_000, 100_000], help="memories of each graph")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go while this runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        print(json.dumps({"append in arrays, CPU us": appends(), **adds(folder / "adds")}))
        print(json.dumps(forgets(folder / "forgets", clustered(200_000))), flush=True)
        for count in arguments.nodes:
            vectors = clustered(count)
            fill(folder / str(count), vectors)
            result: dict[str, Any] = {"memories": count}
            for state in ("file alone", "snapshot"):
                begin, cpu = time.perf_counter(), time.process_time()
                graph = MemoryGraph(folder / str(count))
                result[f"opened from {state}, s"] = time.perf_counter() - begin
                result[f"opened from {state}, CPU s"] = time.process_time() - cpu
                graph.settle()
                if state == "snapshot":
                    rounds, slow = {10_000: (200, 10), 100_000: (100, 3)}.get(count, (30, 0))
                    result |= searches(graph, vectors, rounds, slow)
                graph.close()
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
