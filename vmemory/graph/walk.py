"""Walks over the edges of a graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from vmemory.graph.arrays import Arrays


def nearby(arrays: Arrays, seeds: Sequence[int], bound: int) -> list[tuple[int, int]]:
    """Follow edges forward from the objects of some memories, breadth first.

    Args:
        arrays: The graph.
        seeds: Positions of memories.
        bound: Memories to look at, at most.

    Returns:
        For each memory reached, its position and the seed's from which it was reached; seeds are not among them.
    """
    found: list[tuple[int, int]] = []
    seen = set(seeds)
    nodes: set[int] = set()
    queue = deque((int(arrays.object[seed]), seed) for seed in seeds)
    while queue:
        node, seed = queue.popleft()
        if node in nodes:
            continue
        nodes.add(node)
        for row in arrays.outgoing(node):
            if len(found) >= bound:
                return found
            if row not in seen:
                seen.add(row)
                found.append((row, seed))
            queue.append((int(arrays.object[row]), seed))
    return found


def perstream_walk(arrays: Arrays, scores: np.ndarray, seeds: Sequence[int], delta: float) -> list[int]:
    """Return the memories that PerStream's retrieval returns, in its order.

    From each seed that reaches `delta`, a depth-first walk without bound goes forward through nodes of any score. Those
    that reach `delta` are returned; no node is visited twice by any seed.

    Args:
        arrays: A graph whose memories were added by the rule `perstream`: each node has one memory with a caption.
        scores: `[rows]`, cosine of each memory with the query, NaN without a vector.
        seeds: Positions of the memories with the best scores, best first.
        delta: The least score.
    """
    found: list[int] = []
    visited: set[int] = set()
    for seed in seeds:
        if not scores[seed] >= delta:
            continue
        stack = [int(arrays.object[seed])]
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            own = [row for row in arrays.about(node) if arrays.subject[row] < 0]
            found += [row for row in reversed(own) if scores[row] >= delta]
            # the newest edge's object is visited first
            stack += reversed([int(arrays.object[row]) for row in arrays.outgoing(node)])
    return found
