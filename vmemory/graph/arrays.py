"""The graph in arrays: nodes, memories, and lists of a node's memories linked through the arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vmemory.graph.growing import Growing

# bytes of a memory by granularity, finest first; the order in which the reductions of the literature remove them
GRANULARITIES = ("nearest", "mean", "vector", "caption")
NEAREST, MEAN, VECTOR, CAPTION = range(4)

NODE_COLUMNS: dict[str, Any] = {"id": np.int64, "user": np.int32, "category": np.int16, "live": np.bool_}
ROW_COLUMNS: dict[str, Any] = {
    "id": np.int64, "user": np.int32, "category": np.int16, "subject": np.int32, "object": np.int32,
    "video": np.int32, "time": np.float64, "valid_from": np.float64, "valid_to": np.float64, "visits": np.int64,
    "reduced": np.int8,
}  # fmt: skip


class Row(NamedTuple):
    """The numbers of one memory.

    `subject` and `object` are positions of nodes, −1 = none; `reduced` has a bit for each granularity that was removed.
    """

    id: int
    user: int
    category: int
    subject: int
    object: int
    video: int
    time: float
    valid_from: float
    valid_to: float
    visits: int
    reduced: int


class Arrays:
    """Nodes and memories by position.

    A memory with a subject is a directed edge from it to its object. A memory without one is about its object alone.
    Each node has two lists, newest first: memories that leave it (`first_out`, `next_out`) and memories about it
    (`first_in`, `next_in`). Positions never change before `compact`; what was forgotten is not `live`.

    Args:
        dim: Channels of the caption vectors.

    Attributes:
        nodes: Number of nodes.
        rows: Number of memories.
        visible: Number of memories that readers see; the rest belongs to a transaction that has not ended.
        unsearchable: Number of memories that are not live or have no vector.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.nodes = self.rows = self.visible = 0
        self._node = {name: Growing(dtype) for name, dtype in NODE_COLUMNS.items()}
        self._node |= {name: Growing(np.int32) for name in ("first_out", "first_in")}
        self._row = {name: Growing(dtype) for name, dtype in ROW_COLUMNS.items()}
        self._row |= {name: Growing(np.int32) for name in ("next_out", "next_in")}
        self._row |= {name: Growing(np.bool_) for name in ("live", "searchable")}
        self._row |= {"size": Growing(np.int64, (4,)), "vector": Growing(np.float32, (dim,))}
        # of labels; most graphs have none
        self._label: Growing | None = None
        self.unsearchable = 0
        self._views()

    def _views(self) -> None:
        self.node_id, self.node_user, self.node_category = (self._node[n].array for n in ("id", "user", "category"))
        self.node_live, self.first_out, self.first_in = (
            self._node[n].array for n in ("live", "first_out", "first_in")
        )  # fmt: skip
        self.id, self.user, self.category = (self._row[n].array for n in ("id", "user", "category"))
        self.subject, self.object, self.video = (self._row[n].array for n in ("subject", "object", "video"))
        self.time, self.valid_from, self.valid_to = (self._row[n].array for n in ("time", "valid_from", "valid_to"))
        self.visits, self.reduced = self._row["visits"].array, self._row["reduced"].array
        self.size, self.vector = self._row["size"].array, self._row["vector"].array
        self.next_out, self.next_in = self._row["next_out"].array, self._row["next_in"].array
        self.live, self.searchable = self._row["live"].array, self._row["searchable"].array

    def _grow(self, columns: dict[str, Growing], rows: int) -> None:
        # an array moves only when nothing looks at it
        for name in list(vars(self)):
            if isinstance(getattr(self, name), np.ndarray):
                delattr(self, name)
        for column in columns.values():
            column.reserve(rows)
        self._views()

    def reserve_nodes(self, count: int) -> None:
        """Make room for this many nodes."""
        if count > len(self.node_id):
            self._grow(self._node, max(count, len(self.node_id) * 3 // 2))

    def reserve_rows(self, count: int) -> None:
        """Make room for this many memories."""
        if count > len(self.id) or count > len(self.vector):
            self._grow(self._row, max(count, len(self.vector) * 3 // 2))

    def add_node(self, id: int, user: int, category: int) -> int:
        """Append a node and return its position."""
        position = self.nodes
        if position >= len(self.node_id):
            self.reserve_nodes(position + 1)
        self.node_id[position] = id
        self.node_user[position] = user
        self.node_category[position] = category
        self.node_live[position] = True
        self.first_out[position] = self.first_in[position] = -1
        if self._label is not None and position < len(self._label.array):
            self._label.array[position] = 0
        self.nodes = position + 1
        return position

    def add_row(self, row: Row, size: tuple[int, int, int, int], vector: np.ndarray | None) -> int:
        """Append a memory, put it into the lists of its nodes, and return its position."""
        position = self.rows
        if position >= len(self.vector) or position >= len(self.id):
            self.reserve_rows(position + 1)
        subject, object = row.subject, row.object
        self.id[position] = row.id
        self.user[position] = row.user
        self.category[position] = row.category
        self.subject[position] = subject
        self.object[position] = object
        self.video[position] = row.video
        self.time[position] = row.time
        self.valid_from[position] = row.valid_from
        self.valid_to[position] = row.valid_to
        self.visits[position] = row.visits
        self.reduced[position] = row.reduced
        self.size[position] = size
        self.live[position] = True
        if vector is not None:
            self.vector[position] = vector
            self.searchable[position] = True
        else:
            self.vector[position] = 0
            self.searchable[position] = False
            self.unsearchable += 1
        if subject >= 0:
            self.next_out[position] = self.first_out[subject]
            self.first_out[subject] = position
        self.next_in[position] = self.first_in[object]
        self.first_in[object] = position
        self.rows = position + 1
        return position

    def truncate(self, nodes: int, rows: int) -> None:
        """Take back what was appended last."""
        for position in range(self.rows - 1, rows - 1, -1):
            subject, object = self.subject[position], self.object[position]
            if subject >= 0:
                self.first_out[subject] = self.next_out[position]
            self.first_in[object] = self.next_in[position]
            self.unsearchable -= not self.searchable[position]
            self.vector[position] = 0
        self.nodes, self.rows = nodes, rows

    def outgoing(self, node: int, *, all: bool = False) -> Iterator[int]:
        """Return the live memories that leave a node, newest first; `all` includes those not yet visible."""
        return self._list(self.first_out[node], self.next_out, self.rows if all else self.visible)

    def about(self, node: int, *, all: bool = False) -> Iterator[int]:
        """Return the live memories about a node, newest first; `all` includes those not yet visible."""
        return self._list(self.first_in[node], self.next_in, self.rows if all else self.visible)

    def _list(self, first: int, following: np.ndarray, end: int) -> Iterator[int]:
        row = int(first)
        while row >= 0:
            if row < end and self.live[row]:
                yield row
            row = int(following[row])

    def link(self) -> None:
        """Make the lists of all nodes anew from the subjects and objects."""
        for node_of, first, following in (
            (self.subject, self.first_out, self.next_out),
            (self.object, self.first_in, self.next_in),
        ):
            first[: self.nodes] = -1
            rows = np.flatnonzero(node_of[: self.rows] >= 0)
            nodes = node_of[rows]
            order = np.argsort(nodes, kind="stable")
            rows, nodes = rows[order].astype(np.int32), nodes[order]
            if not len(rows):
                continue
            same = np.flatnonzero(nodes[1:] == nodes[:-1])
            following[: self.rows] = -1
            following[rows[same + 1]] = rows[same]
            last = np.append(nodes[1:] != nodes[:-1], True)
            first[nodes[last]] = rows[last]

    def drop_rows(self, rows: np.ndarray) -> np.ndarray:
        """Mark memories as forgotten, and the nodes that nothing is about any more; return those nodes' positions."""
        self.unsearchable += int(self.searchable[rows].sum())
        self.live[rows] = self.searchable[rows] = False
        left = np.flatnonzero(self.live[: self.rows])
        touched, used = np.zeros((2, self.nodes + 1), np.bool_)
        for ends in (self.subject, self.object):
            # no subject is -1, the place behind all nodes
            touched[ends[rows]] = used[ends[left]] = True
        orphans = np.flatnonzero((touched & ~used)[:-1])
        self.node_live[orphans] = False
        return orphans

    def compact(self) -> None:
        """Move what is live together, and make the lists anew."""
        kept, nodes = np.flatnonzero(self.live[: self.rows]), np.flatnonzero(self.node_live[: self.nodes])
        position = np.full(self.nodes + 1, -1, np.int32)
        position[nodes] = np.arange(len(nodes), dtype=np.int32)
        for name, growing in self._row.items():
            if name == "vector":
                # in blocks, because vectors are most of what the graph holds; a row never moves back
                for begin in range(0, len(kept), 4096):
                    block = kept[begin : begin + 4096]
                    growing.array[begin : begin + len(block)] = growing.array[block]
                growing.array[len(kept) : self.rows] = 0
            else:
                growing.array[: len(kept)] = growing.array[kept]
        for name in ("subject", "object"):
            column = self._row[name].array
            column[: len(kept)] = position[column[: len(kept)]]
        if self._label is not None:
            labels = self.labels()
            labels[: len(nodes)] = labels[nodes]
            labels[len(nodes) :] = 0
        for growing in self._node.values():
            growing.array[: len(nodes)] = growing.array[nodes]
        self.nodes, self.rows, self.visible = len(nodes), len(kept), len(kept)
        self.unsearchable = self.rows - int(self.searchable[: self.rows].sum())
        self.link()

    def labels(self) -> np.ndarray:
        """Return the vectors of labels `[nodes, dim]`, 0 for a node without one."""
        if self._label is None:
            self._label = Growing(np.float32, (self.dim,))
        self._label.reserve(self.nodes)
        return self._label.array[: self.nodes]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays for what they hold, vectors included."""
        row = sum(column.array[:1].nbytes for column in self._row.values())
        node = sum(column.array[:1].nbytes for column in self._node.values())
        label = self.nodes * 4 * self.dim if self._label is not None else 0
        return self.rows * row + self.nodes * node + label
