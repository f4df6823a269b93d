"""Erase what was forgotten from a graph's file, in steps that a killed process takes up again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vmemory.graph.arrays import Arrays
from vmemory.graph.file import GraphFile, GraphFileError

# memories that one transaction deletes, so that others wait for milliseconds
STEP = 1000


@dataclass(frozen=True)
class Forgetting:
    """Conditions of the memories that are forgotten; all hold together.

    Attributes:
        upto: The newest memory's id at the moment of the request; later ones stay.
        user: Id of the user.
        nodes: Ids of nodes that a memory begins or ends at, empty for any.
        category: Number of the category, or None.
        video: Id of the video, or None.
        since: Least time, or None.
        until: Time before which, or None.
    """

    upto: int
    user: int
    nodes: list[int]
    category: int | None
    video: int | None
    since: float | None
    until: float | None

    def rows(self, arrays: Arrays) -> np.ndarray:
        """Return the positions of the memories in the arrays."""
        M = arrays.rows
        mask = arrays.live[:M] & (arrays.user[:M] == self.user) & (arrays.id[:M] <= self.upto)
        if self.nodes:
            at = np.searchsorted(arrays.node_id[: arrays.nodes], self.nodes)
            mask &= np.isin(arrays.subject[:M], at) | np.isin(arrays.object[:M], at)
        for name in ("category", "video"):
            if (wanted := getattr(self, name)) is not None:
                mask &= getattr(arrays, name)[:M] == wanted
        if self.since is not None:
            mask &= arrays.time[:M] >= self.since
        if self.until is not None:
            mask &= arrays.time[:M] < self.until
        return np.flatnonzero(mask)

    def condition(self) -> tuple[str, list[Any]]:
        """Return the same as SQL and its values."""
        parts = ["id <= ?", "user = ?"]
        values: list[Any] = [self.upto, self.user]
        if self.nodes:
            marks = ", ".join(map(str, map(int, self.nodes)))
            parts.append(f"(subject IN ({marks}) OR object IN ({marks}))")
        conditions = (
            ("category = ?", self.category), ("video = ?", self.video), ("time >= ?", self.since),
            ("time < ?", self.until),
        )  # fmt: skip
        for part, value in conditions:
            if value is not None:
                parts.append(part)
                values.append(value)
        return " AND ".join(parts), values


def note(file: GraphFile, what: Forgetting) -> int:
    """Write a request down, so that a process that is killed now does not take it back, and return its number."""
    with file.transaction() as writer:
        return writer.execute("INSERT INTO forgetting (what) VALUES (?)", (json.dumps(asdict(what)),)).lastrowid or 0


def noted(file: GraphFile) -> dict[int, Forgetting]:
    """Return the requests that are not done, by their numbers."""
    found = {}
    for number, text in file.writer.execute("SELECT id, what FROM forgetting WHERE length(what) < 1000000"):
        try:
            values = json.loads(text)
            nodes = [int(node) for node in values.pop("nodes")]
            found[number] = Forgetting(nodes=nodes, **values)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise GraphFileError(f"{file.path}: damaged (a request to forget that cannot be read)") from None
    return found


def erase_some(file: GraphFile, what: Forgetting, after: int) -> int | None:
    """Delete some memories behind an id, and return the last one's; None if there are no more."""
    where, values = what.condition()
    with file.transaction() as writer:
        sql = f"SELECT id FROM memory WHERE id > ? AND {where} ORDER BY id LIMIT {STEP}"
        ids = [row[0] for row in writer.execute(sql, [after, *values])]
        writer.executemany("DELETE FROM visual WHERE id BETWEEN ? AND ?", ((4 * i, 4 * i + 3) for i in ids))
        file.delete("vector", ids)
        file.delete("memory", ids)
    return ids[-1] if ids else None


def tidy(file: GraphFile, nodes: list[int], users: list[int], videos: list[int]) -> None:
    """Delete nodes, and every user and video but those that are still there."""
    with file.transaction() as writer:
        file.delete("node", nodes)
        for table, kept in (("user", users), ("video", videos)):
            held = set(kept)
            file.delete(table, [row[0] for row in writer.execute(f"SELECT id FROM {table}") if row[0] not in held])
