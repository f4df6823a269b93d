"""Read a graph's file into arrays; every number is checked before it is used as a position."""

from __future__ import annotations

import sqlite3
from typing import Any

import numpy as np

from vmemory.graph.arguments import MAX_NAME, MAX_TEXT
from vmemory.graph.arrays import CAPTION, MEAN, NEAREST, VECTOR, Arrays
from vmemory.graph.file import VISUALS, GraphFile, GraphFileError
from vmemory.graph.vectors import read_vectors, snapshot_path

_NODE = np.dtype(
    [("id", "i8"), ("user", "i4"), ("category", "i2"), ("label", "i8"), ("key", "i8"), ("vector", "i8")]
)  # fmt: skip
_MEMORY = np.dtype(
    [
        ("id", "i8"), ("user", "i4"), ("category", "i2"), ("subject", "i8"), ("object", "i8"), ("video", "i4"),
        ("time", "f8"), ("valid_from", "f8"), ("valid_to", "f8"), ("visits", "i8"), ("vector", "i8"), ("caption", "i8"),
        ("predicate", "i8"), ("reduced", "i1"),
    ]
)  # fmt: skip
_SELECT_MEMORY = (
    "SELECT id, user, category, coalesce(subject, -1), object, coalesce(video, -1), time, valid_from, valid_to, visits,"
    " vector, coalesce(length(CAST(caption AS BLOB)), 0),"
    " coalesce(length(CAST(predicate AS BLOB)), 0), reduced FROM memory ORDER BY id"
)
# columns that are read when a memory is shown
_STRANGE = (
    "SELECT EXISTS (SELECT 1 FROM memory WHERE typeof(caption) NOT IN ('text', 'null') OR typeof(predicate) NOT IN"
    " ('text', 'null') OR typeof(seconds) NOT IN ('real', 'null') OR typeof(frame) NOT IN ('integer', 'null')"
    " UNION ALL"
    " SELECT 1 FROM node WHERE typeof(label) != 'text' OR typeof(vector) NOT IN ('blob', 'null'))"
)


def names(file: GraphFile) -> tuple[dict[int, str], dict[int, tuple[int, str]]]:
    """Read the users' names, and of each video its user and name, by id.

    Raises:
        GraphFileError: They are not what a graph writes.
    """
    try:
        users, videos = (
            file.reader.execute(f"SELECT {columns} WHERE length(CAST(name AS BLOB)) <= {MAX_NAME}").fetchall()
            for columns in ("id, name FROM user", "id, user, name FROM video")
        )
        if not all(isinstance(row[-1], str) for row in (*users, *videos)):
            raise GraphFileError(f"{file.path}: damaged (a name that is not text)")
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise GraphFileError(f"{file.path}: damaged ({error})") from None
    return dict(users), {id: (user, name) for id, user, name in videos}


def load(file: GraphFile, arrays: Arrays, users: dict[int, str], videos: dict[int, tuple[int, str]]) -> int:
    """Fill empty arrays from a file, and return how many vectors the snapshot did not have.

    Args:
        file: The graph's file.
        arrays: Filled here.
        users: Names by id.
        videos: User and name by id.

    Raises:
        GraphFileError: The file holds something that no graph writes.
    """
    try:
        if file.reader.execute(_STRANGE).fetchone()[0]:
            raise GraphFileError(f"{file.path}: damaged (a value of another kind than its column's)")
        nodes = _table(file, "SELECT id, user, category, length(CAST(label AS BLOB)), length(CAST(key AS BLOB)), "
                       "coalesce(length(vector), 0) FROM node ORDER BY id", _NODE)  # fmt: skip
        rows = _table(file, _SELECT_MEMORY, _MEMORY)
        _check(file, nodes, rows, users, videos)
        _fill(file, arrays, nodes, rows)
        missing = _vectors(file, arrays)
        _label_vectors(file, arrays, nodes)
    except (sqlite3.DatabaseError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, GraphFileError):
            raise
        raise GraphFileError(f"{file.path}: damaged ({str(error).splitlines()[0]})") from None
    return missing


def _table(file: GraphFile, sql: str, dtype: np.dtype) -> np.ndarray:
    parts = []
    cursor = file.reader.execute(sql)
    while some := cursor.fetchmany(50_000):
        parts.append(np.array(some, dtype))
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _check(
    file: GraphFile, nodes: np.ndarray, rows: np.ndarray, users: dict[int, str], videos: dict[int, tuple[int, str]]
) -> None:
    """Check ranges and references."""

    def refuse(what: str) -> None:
        raise GraphFileError(f"{file.path}: damaged ({what})")

    dim, categories = file.about["dim"], len(file.about["categories"])
    for name, table in (("node", nodes), ("memory", rows)):
        if not np.isin(table["user"], list(users)).all():
            refuse(f"a {name} of no user")
        if len(table) and not (table["category"].min() >= 0 and table["category"].max() < categories):
            refuse(f"a {name} of no category")
        if not np.isin(table["vector"], (0, 4 * dim)).all():
            refuse(f"a {name} with a vector of another length than {dim}")
        if len(table) and table["id"].min() < 1:
            refuse(f"a {name} with an id below 1")
    if max((nodes[n].max() for n in ("label", "key") if len(nodes)), default=0) > 2 * MAX_NAME:
        refuse("a label beyond the limit")
    if max((rows[n].max() for n in ("caption", "predicate") if len(rows)), default=0) > MAX_TEXT:
        refuse("a text beyond the limit")
    ids, owners = nodes["id"], nodes["user"]
    for name in ("subject", "object"):
        named = rows[name] if name == "object" else rows[name][rows[name] != -1]
        of = rows["user"] if name == "object" else rows["user"][rows[name] != -1]
        at = np.searchsorted(ids, named)
        if len(named) and not (len(ids) and (ids[np.minimum(at, len(ids) - 1)] == named).all()):
            refuse(f"a memory whose {name} is no node")
        if len(named) and not (owners[at] == of).all():
            refuse(f"a memory whose {name} belongs to another user")
    owned = np.array([videos.get(int(video), (-1, ""))[0] for video in np.unique(rows["video"]) if video != -1])
    if len(owned) and owned.min() < 0:
        refuse("a memory of no video")
    if not (np.isfinite(rows["time"]).all() and (rows["valid_from"] <= rows["valid_to"]).all()):
        refuse("a memory of no time")
    if len(rows) and rows["visits"].min() < 0:
        refuse("a number of visits below 0")


def _fill(file: GraphFile, arrays: Arrays, nodes: np.ndarray, rows: np.ndarray) -> None:
    N, M = len(nodes), len(rows)
    arrays.reserve_nodes(N)
    arrays.reserve_rows(M)
    for name in ("id", "user", "category"):
        getattr(arrays, f"node_{name}")[:N] = nodes[name]
        getattr(arrays, name)[:M] = rows[name]
    for name in ("video", "time", "valid_from", "valid_to", "visits", "reduced"):
        getattr(arrays, name)[:M] = rows[name]
    arrays.node_live[:N] = arrays.live[:M] = True
    arrays.object[:M] = np.searchsorted(nodes["id"], rows["object"])
    arrays.subject[:M] = np.where(rows["subject"] == -1, -1, np.searchsorted(nodes["id"], rows["subject"]))
    arrays.size[:M, VECTOR], arrays.size[:M, CAPTION] = rows["vector"], rows["caption"]
    arrays.nodes, arrays.rows, arrays.visible = N, M, M
    arrays.link()
    for row, nbytes in file.reader.execute("SELECT id, length(data) FROM visual"):
        memory, kind = divmod(row, 4)
        at = int(np.searchsorted(rows["id"], memory))
        if kind >= len(VISUALS) or at >= M or rows["id"][at] != memory:
            raise GraphFileError(f"{file.path}: damaged (a picture of no memory)")
        arrays.size[at, MEAN if VISUALS[kind] == "mean" else NEAREST] += nbytes


def _vectors(file: GraphFile, arrays: Arrays) -> int:
    """Read vectors from the snapshot, and from the file where it has none; return the number of the latter."""
    M, dim = arrays.rows, file.about["dim"]
    ids, wanted = arrays.id[:M], arrays.size[:M, VECTOR] > 0
    given = np.zeros(M, np.bool_)
    if file.path is not None:
        try:
            for some, vectors in read_vectors(snapshot_path(file.path), file.about["uuid"], dim):
                at = np.searchsorted(ids, some)
                found = (at < M) & (ids[np.minimum(at, M - 1)] == some) if M else np.zeros(len(some), np.bool_)
                found[found] &= wanted[at[found]]
                arrays.vector[at[found]] = vectors[found]
                given[at[found]] = True
        except ValueError:
            # the snapshot is a copy, the file has them all
            given[:] = False
    missing = np.flatnonzero(wanted & ~given)
    known: Any = file.reader.execute("SELECT id, data FROM vector ORDER BY id")
    if len(missing) <= M // 2:
        known = iter(sorted(file.rows_of("SELECT id, data FROM vector WHERE id IN", ids[missing].tolist())))
    # both ascend
    for row in missing.tolist():
        id = ids[row]
        data = next((data for found, data in known if found == id), None)
        if not isinstance(data, bytes) or len(data) != 4 * dim:
            raise GraphFileError(f"{file.path}: damaged (memory {id} without its vector)")
        arrays.vector[row] = np.frombuffer(data, "<f4")
    arrays.searchable[:M] = wanted
    arrays.unsearchable = M - int(wanted.sum())
    for begin in range(0, M, 8192):
        end = min(begin + 8192, M)
        squares = np.einsum("nd,nd->n", arrays.vector[begin:end], arrays.vector[begin:end])
        if not (np.abs(squares - wanted[begin:end]) < 1e-3).all():
            raise GraphFileError(f"{file.path}: damaged (a vector whose length is not 1)")
    return len(missing)


def _label_vectors(file: GraphFile, arrays: Arrays, nodes: np.ndarray) -> None:
    if not (nodes["vector"] > 0).any():
        return
    labels = arrays.labels()
    for id, vector in file.reader.execute("SELECT id, vector FROM node WHERE vector IS NOT NULL"):
        labels[np.searchsorted(nodes["id"], id)] = np.frombuffer(vector, "<f4")
    if not np.isfinite(labels).all():
        raise GraphFileError(f"{file.path}: damaged (a vector of a label that is not finite)")
