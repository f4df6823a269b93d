"""Rules of adding: which nodes a fact connects, and what of it is kept."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vmemory.graph.arrays import Arrays, Row
from vmemory.graph.file import INSERT_MEMORY, INSERT_NODE, VISUALS, GraphFile, key_of

AddRule = Literal["keep", "perstream", "perstream-duplicates"]
ADD_RULES = get_args(AddRule)

Visual = dict[str, tuple[str, list[int], bytes]]


@dataclass(frozen=True)
class Fact:
    """A checked fact; names are numbers, texts and vectors are ready to be stored."""

    user: int
    category: int
    subject: str
    predicate: str
    object: str
    caption: str
    vector: np.ndarray
    visual: Visual
    time: float
    valid_from: float
    valid_to: float
    video: int | None
    seconds: float | None
    frame: int | None


class Adder:
    """Writes facts into a file and appends them to the arrays; the caller holds a transaction."""

    def __init__(self, file: GraphFile, arrays: Arrays) -> None:
        self._file, self._arrays = file, arrays

    def keep(self, fact: Fact) -> int:
        """Store a fact between the nodes of its labels, and return the memory's position."""
        nodes = []
        for label in (fact.subject, fact.object):
            node = self._named(fact.user, label, None)
            nodes.append(self._make(fact, label, None) if node is None else node)
        return self._insert(fact, nodes[0], fact.predicate, nodes[1], fact.caption, fact.vector, fact.visual)

    def perstream(
        self, fact: Fact, labels: tuple[np.ndarray, np.ndarray], threshold: float, *, duplicates: bool
    ) -> int:
        """Store as PerStream does, and return the position of the object's memory.

        Args:
            fact: The fact.
            labels: Vectors of the labels of subject and object.
            threshold: Least cosine at which two labels are one node.
            duplicates: Whether every fact gets nodes of its own.
        """
        arrays = self._arrays
        nodes = []
        # a subject's memory is its own label, an object's is the fact
        for label, of_label, caption, vector, visual in (
            (fact.subject, labels[0], fact.subject, labels[0], {}),
            (fact.object, labels[1], fact.caption, fact.vector, fact.visual),
        ):
            node = None if duplicates else self._named(fact.user, label, fact.category)
            if node is None and not duplicates:
                node = self._alike(fact, of_label, threshold)
            if node is None:
                node = self._make(fact, label, of_label)
                self._insert(fact, None, None, node, caption, vector, visual)
            nodes.append(node)
        subject, object = nodes
        edges = [int(arrays.id[row]) for row in arrays.outgoing(subject, all=True) if arrays.object[row] == object]
        sql = "SELECT 1 FROM memory WHERE id = ? AND predicate = ?"
        if not any(self._file.writer.execute(sql, (edge, fact.predicate)).fetchone() for edge in edges):
            self._insert(fact, subject, fact.predicate, object, None, None, {})
        return [row for row in arrays.about(object, all=True) if arrays.subject[row] < 0][-1]

    def _named(self, user: int, label: str, category: int | None) -> int | None:
        """Return the oldest live node of a label, in a category or in any."""
        arrays = self._arrays
        sql = "SELECT id FROM node WHERE user = ? AND key = ? ORDER BY id"
        for (id,) in self._file.writer.execute(sql, (user, key_of(label))):
            node = int(np.searchsorted(arrays.node_id[: arrays.nodes], id))
            if arrays.node_live[node] and category in (None, arrays.node_category[node]):
                return node
        return None

    def _alike(self, fact: Fact, vector: np.ndarray, threshold: float) -> int | None:
        """Return the node of the category whose label is most similar, if it reaches the threshold."""
        arrays, N = self._arrays, self._arrays.nodes
        mask = arrays.node_live[:N] & (arrays.node_user[:N] == fact.user) & (arrays.node_category[:N] == fact.category)
        candidates = np.flatnonzero(mask)
        if not len(candidates):
            return None
        scores = arrays.labels()[candidates] @ vector
        best = int(scores.argmax())
        return int(candidates[best]) if scores[best] >= threshold else None

    def _make(self, fact: Fact, label: str, vector: np.ndarray | None) -> int:
        data = None if vector is None else vector.astype("<f4").tobytes()
        values = (fact.user, fact.category, label, key_of(label), data)
        node = self._arrays.add_node(_number(self._file.writer.execute(INSERT_NODE, values)), fact.user, fact.category)
        if vector is not None:
            self._arrays.labels()[node] = vector
        return node

    def _insert(
        self,
        fact: Fact,
        subject: int | None,
        predicate: str | None,
        object: int,
        caption: str | None,
        vector: np.ndarray | None,
        visual: Visual,
    ) -> int:
        arrays, writer = self._arrays, self._file.writer
        of_text = 0 if caption is None else len(caption.encode())
        of_vector = 0 if vector is None else vector.nbytes
        values = (
            fact.user, fact.category, None if subject is None else int(arrays.node_id[subject]), predicate,
            int(arrays.node_id[object]), caption, of_vector,
            fact.time, fact.valid_from, fact.valid_to, fact.video, fact.seconds, fact.frame,
        )  # fmt: skip
        id = _number(writer.execute(INSERT_MEMORY, values))
        if vector is not None:
            writer.execute("INSERT INTO vector VALUES (?, ?)", (id, vector.astype("<f4").tobytes()))
        nbytes = dict.fromkeys(VISUALS, 0)
        for kind, (dtype, shape, data) in visual.items():
            key = 4 * id + VISUALS.index(kind)
            writer.execute("INSERT INTO visual VALUES (?, ?, ?, ?)", (key, dtype, json.dumps(shape), data))
            nbytes[kind] = len(data)
        row = Row(
            id, fact.user, fact.category, -1 if subject is None else subject, object,
            -1 if fact.video is None else fact.video, fact.time, fact.valid_from, fact.valid_to, 0, 0,
        )  # fmt: skip
        return arrays.add_row(row, (nbytes["nearest"] + nbytes["picture"], nbytes["mean"], of_vector, of_text), vector)


def _number(cursor: sqlite3.Cursor) -> int:
    """Return the id of the row that was just written."""
    assert cursor.lastrowid is not None
    return cursor.lastrowid
