"""The SQLite file of a graph, which is the truth: schema, checks at opening, and statements."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vmemory._files import replacing
from vmemory.graph.categories import Category
from vmemory.graph.visuals import MAX_VISUAL, visual_from

# "vmgr" in the header of the file, and the version of its schema
APPLICATION, VERSION = 0x766D6772, 1

# A memory is one row, an edge if it has a subject. Its `vector` is the bytes that it has in the table of vectors, which
# is apart so that opening a file with a snapshot does not read it.
SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE user (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE video (id INTEGER PRIMARY KEY, user INTEGER NOT NULL, name TEXT NOT NULL);
CREATE TABLE node (id INTEGER PRIMARY KEY AUTOINCREMENT, user INTEGER NOT NULL, category INTEGER NOT NULL, label TEXT NOT NULL, key TEXT NOT NULL, vector BLOB);
CREATE INDEX node_key ON node (user, key);
CREATE TABLE memory (id INTEGER PRIMARY KEY AUTOINCREMENT, user INTEGER NOT NULL, category INTEGER NOT NULL, subject INTEGER, predicate TEXT, object INTEGER NOT NULL, caption TEXT, vector INTEGER NOT NULL, time REAL NOT NULL, valid_from REAL NOT NULL, valid_to REAL NOT NULL, video INTEGER, seconds REAL, frame INTEGER, visits INTEGER NOT NULL, reduced INTEGER NOT NULL);
CREATE TABLE vector (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE visual (id INTEGER PRIMARY KEY, dtype TEXT NOT NULL, shape TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE forgetting (id INTEGER PRIMARY KEY, what TEXT NOT NULL);
"""  # noqa: E501  one statement a line

# SQLite's own, which keeps it from using an id twice
_SEQUENCE = "CREATE TABLE sqlite_sequence(name,seq)"

# names in a damaged schema need not be text, and are told in SQLite's errors
_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)

# a memory's visual tokens and picture: the id is four times the memory's, and one of these
VISUALS = ("nearest", "mean", "picture")

INSERT_NODE = "INSERT INTO node (user, category, label, key, vector) VALUES (?, ?, ?, ?, ?)"
INSERT_MEMORY = (
    "INSERT INTO memory (user, category, subject, predicate, object, caption, vector, time, valid_from, valid_to, "
    "video, seconds, frame, visits, reduced) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0)"
)


class GraphFileError(ValueError):
    """A graph file that cannot be used: not one, damaged, of another version, or in use."""


class GraphFile:
    """A graph's SQLite database: one connection that writes, and one that reads while the other is busy.

    Args:
        path: The file; made if nothing is there. None keeps the database in memory.
        about: The number of channels and the categories, for a new file.

    Attributes:
        about: The file's own.

    Raises:
        GraphFileError: The file is not a graph, is damaged, has another version, or is in use; one line says which.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path = path
        self._lock: int | None = None
        self._owner = os.getpid()
        # a transaction that is taken back would break off what is being read on the same connection
        self._guard = threading.Lock()
        if path is None:
            self.writer = self.reader = _connect(":memory:")
            _create(self.writer, about)
            self.about = about
            return
        if not path.exists():
            _create_file(path, about)
        if not path.is_file():
            raise GraphFileError(f"{path}: expected a file, got a {'folder' if path.is_dir() else 'device or a pipe'}")
        self._lock = _lock(path)
        try:
            self._open(path)
        except _DAMAGE as error:
            self.close()
            raise GraphFileError(f"{path}: damaged ({error})") from None
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        _check_header(path)
        self.writer = _connect(path)
        # the header may come from the write-ahead log, which the first check did not read
        (application,), (version,) = (
            self.writer.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application != APPLICATION:
            raise GraphFileError(f"{path}: not a memory graph")
        _check_version(path, version)
        found = {row[0] for row in self.writer.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        # a view or trigger of somebody else would run in our statements
        if found != {line.rstrip(";") for line in SCHEMA.strip().splitlines()} | {_SEQUENCE}:
            raise GraphFileError(f"{path}: its tables are not those of a memory graph")
        self.writer.execute("PRAGMA journal_mode = WAL").fetchone()
        self.about = self._read_about(path)
        self.reader = _connect(path)
        self.reader.execute("PRAGMA query_only = ON")

    def _read_about(self, path: Path) -> dict[str, Any]:
        total = self.writer.execute("SELECT sum(length(value)) FROM about").fetchone()[0] or 0
        if not 0 < total < 10_000_000:
            raise GraphFileError(f"{path}: damaged (no description of the graph)")
        values = dict(self.writer.execute("SELECT key, value FROM about").fetchall())
        try:
            about = {name: json.loads(values[name]) for name in ("dim", "categories", "uuid")}
            categories = [Category(*map(str, category)) for category in about["categories"]]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise GraphFileError(f"{path}: damaged (the description of the graph cannot be read)") from None
        dim = about["dim"]
        if type(dim) is not int or not 1 <= dim <= 65_536 or not 1 <= len(categories) <= 10_000:
            raise GraphFileError(f"{path}: damaged (dim {dim!r}, {len(categories)} categories)")
        return {"dim": dim, "categories": categories, "uuid": str(about["uuid"])}

    def check_process(self) -> None:
        """Refuse a forked process: a connection to SQLite does not survive a fork."""
        if os.getpid() != self._owner:
            raise RuntimeError("graph: opened by the process that forked this one; open the file anew after it ended")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run statements that take effect together, or not at all."""
        self.check_process()
        with self._told():
            self.writer.execute("BEGIN IMMEDIATE")
            try:
                yield self.writer
                self.writer.execute("COMMIT")
            except BaseException:
                with self._guard:
                    if self.writer.in_transaction:
                        self.writer.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise errors of SQLite as those of a disk or of a damaged file."""
        try:
            yield
        # a full disk, a file that may not be written to
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise GraphFileError(f"{self.path}: damaged ({error})") from None

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        self.check_process()
        try:
            with self._guard:
                return self.reader.execute(sql, values).fetchall()
        except _DAMAGE as error:
            raise GraphFileError(f"{self.path}: damaged ({error})") from None

    def rows_of(self, sql: str, ids: Sequence[int]) -> list[tuple[Any, ...]]:
        """Read rows by their ids; `sql` ends with `IN`."""
        found = []
        for begin in range(0, len(ids), 500):
            some = ids[begin : begin + 500]
            found += self._read(f"{sql} ({', '.join('?' * len(some))})", some)
        return found

    def node_ids(self, user: int, label: str) -> list[int]:
        """Return the ids of a user's nodes of a label, without regard to case."""
        sql = "SELECT id FROM node WHERE user = ? AND key = ? ORDER BY id"
        return [row[0] for row in self._read(sql, (user, key_of(label)))]

    def visual(self, id: int, kind: str) -> Tensor | bytes | None:
        """Read visual tokens or a picture of a memory."""
        sql = "SELECT dtype, shape, data FROM visual WHERE id = ? AND length(data) <= ?"
        rows = self._read(sql, (4 * id + VISUALS.index(kind), MAX_VISUAL))
        try:
            return visual_from(*rows[0]) if rows else None
        except (ValueError, RecursionError) as error:
            raise GraphFileError(f"{self.path}: damaged ({error})") from None

    def mark_reduced(self, marks: Iterable[int], ids: Iterable[int]) -> None:
        """Store which granularities memories have lost, a bit for each."""
        self.writer.executemany("UPDATE memory SET reduced = ? WHERE id = ?", zip(marks, ids, strict=True))

    def clear(self, column: str, ids: Iterable[int]) -> None:
        """Remove the captions or the vectors of memories."""
        ids = [int(i) for i in ids]
        value = "0" if column == "vector" else "NULL"
        self.writer.executemany(f"UPDATE memory SET {column} = {value} WHERE id = ?", ((i,) for i in ids))
        if column == "vector":
            self.delete("vector", ids)

    def count_visits(self, counts: Iterable[int], ids: Iterable[int]) -> None:
        """Store how often memories were found."""
        self.writer.executemany("UPDATE memory SET visits = ? WHERE id = ?", zip(counts, ids, strict=True))

    def delete(self, table: str, ids: Iterable[int]) -> None:
        """Delete rows by their ids."""
        self.writer.executemany(f"DELETE FROM {table} WHERE id = ?", ((int(i),) for i in ids))

    def scrub(self) -> None:
        """Rewrite the file without what was deleted, and empty the write-ahead log.

        `secure_delete` overwrites deleted rows, but copies remain in gaps of pages that SQLite has once rebalanced.
        """
        self.check_process()
        if self.path is not None:
            with self._told():
                self.writer.execute("VACUUM")
                self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Close the connections and give the file free."""
        for name in ("reader", "writer"):
            # a connection of the process before a fork stays with that process
            if hasattr(self, name) and os.getpid() == self._owner:
                getattr(self, name).close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    __del__ = close


def key_of(label: str) -> str:
    """Return a label without regard to case and outer spaces."""
    return label.strip().lower()


def _connect(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    for setting in ("synchronous = NORMAL", "secure_delete = ON", "trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {setting}")
    # temporary tables of a VACUUM would lie in a file of their own
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


def _create(connection: sqlite3.Connection, about: dict[str, Any]) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("BEGIN")
    for statement in SCHEMA.strip().splitlines():
        connection.execute(statement)
    connection.executemany("INSERT INTO about VALUES (?, ?)", ((k, json.dumps(v)) for k, v in about.items()))
    connection.execute("COMMIT")


def _create_file(path: Path, about: dict[str, Any]) -> None:
    """Make a whole file or none; if another process was faster, its file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as made:
            connection = _connect(made)
            try:
                _create(connection, about)
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
            finally:
                connection.close()
            # replacing a file by another name of its own does nothing; a link that exists is refused
            os.link(made, path)
    except FileExistsError:
        pass


def _lock(path: Path) -> int:
    """Keep other processes out for as long as the descriptor is open.

    The descriptor stays open as long as SQLite's own: closing any of them gives SQLite's locks away.
    """
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise GraphFileError(f"{path}: in use by another process or by another graph of this one") from None
    return handle


def _check_header(path: Path) -> None:
    """Check the first bytes before SQLite reads the file."""
    with path.open("rb") as file:
        head = file.read(100)
    if not head.startswith(b"SQLite format 3\0"):
        raise GraphFileError(f"{path}: not a memory graph" if head else f"{path}: an empty file, not a memory graph")
    if len(head) < 100:
        raise GraphFileError(f"{path}: cut short, {len(head)} bytes are left")
    if int.from_bytes(head[68:72], "big") != APPLICATION:
        raise GraphFileError(f"{path}: a database, but not a memory graph")
    _check_version(path, int.from_bytes(head[60:64], "big"))


def _check_version(path: Path, version: int) -> None:
    if version != VERSION:
        raise GraphFileError(f"{path}: version {version}, this vmemory reads version {VERSION}")
