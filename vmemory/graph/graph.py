"""A personal memory graph: facts with captions, vectors, pictures and times, kept in a file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from vmemory.banks.lock import MemoryLock
from vmemory.graph import arguments as check
from vmemory.graph.adding import ADD_RULES, Adder, AddRule, Fact, Visual
from vmemory.graph.arrays import CAPTION, GRANULARITIES, MEAN, NEAREST, VECTOR, Arrays
from vmemory.graph.categories import CATEGORIES, Category
from vmemory.graph.erasing import Forgetting, erase_some, note, noted, tidy
from vmemory.graph.file import VISUALS, GraphFile
from vmemory.graph.loading import load, names
from vmemory.graph.records import Found, GraphStats, PersonalMemory, Reduced
from vmemory.graph.reduction import RULES
from vmemory.graph.vectors import snapshot_path, write_vectors
from vmemory.graph.visuals import picture_of, tokens_of
from vmemory.graph.walk import nearby, perstream_walk
from vmemory.ops import similarity_topk

# the snapshot of fewer vectors would not be faster than the file
SNAPSHOT_FROM = 4096

SearchRule = Literal["exact", "perstream"]
# position of a memory, its score, and the position of the memory from which the walk reached it
_Hit = tuple[int, float, int | None]
ReduceRule = Literal["value", "nsbg", "gsbn"]


class MemoryGraph:
    """A graph of personal memories: nodes are people and things, memories are facts about them.

    A memory is an edge from its subject to its object. It has a caption, the caption's vector and, if given, visual
    tokens and a picture. It knows its category, when it was seen, from when until when it is true, and the video,
    second and frame that it comes from. Users have namespaces that no search crosses.

    The file is the truth: when `add` returns, no crash of the process loses the memory. Numbers and vectors are held in
    arrays, which are rebuilt when the file is opened; texts and pictures stay in the file. A snapshot of the vectors
    lies beside it. Threads may call everything at once; a file is open in one graph at a time.

    Args:
        path: The file, made if nothing is there; None keeps the graph in memory.
        encoder: Embeds captions and queries, for example `vmemory.encoders.SentenceEncoder()`; without it `add` and
            `search` take vectors.
        dim: Channels of the vectors; None takes the file's, else the encoder's, else 384.
        categories: For a new file; default `CATEGORIES`, PerStream's 34.
        user: The user of calls that name nobody.

    Attributes:
        path: The file, or None.
        dim: Channels of the vectors.
        categories: `Category` by name.
        user: As given.

    Raises:
        GraphFileError: The file is no graph, is damaged, of another version, or in use.
        ValueError: `dim` or `categories` cannot be, or is not the file's.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        encoder: check.TextEncoder | None = None,
        dim: int | None = None,
        categories: Sequence[Category] | None = None,
        user: str = "me",
    ) -> None:
        if dim is not None:
            check.count("dim", dim, 1, 65_536)
        given = check.categories(CATEGORIES if categories is None else categories)
        self.user = check.text("user", user, check.MAX_NAME)
        if "\0" in str(path):
            raise ValueError(f"path: expected a name without NUL, got {str(path)!r}")
        self.path = None if path is None else Path(path).expanduser().resolve()
        self._encoder = encoder
        # a writer takes the first lock and then the second; a reader takes the second alone
        self._writing, self._reading = MemoryLock(), MemoryLock()
        self._batching = self._closed = False
        self._undo: list[Callable[[], object]] = []
        self._visited: set[int] = set()
        self._queueing = threading.Lock()
        self._tasks: list[Future[None]] = []
        self._worker = ThreadPoolExecutor(1, "vmemory-graph")
        about = {"dim": dim or getattr(encoder, "dim", None) or 384, "categories": given, "uuid": str(uuid4())}
        self._file = GraphFile(self.path, about)
        try:
            self.dim: int = self._file.about["dim"]
            if dim not in (None, self.dim):
                raise ValueError(f"dim: expected {self.dim}, the file's, got {dim}")
            if categories is not None and given != self._file.about["categories"]:
                raise ValueError(f"categories: expected those of {self.path}, got others")
            self.categories = {category.name: category for category in self._file.about["categories"]}
            self._numbers = {name: number for number, name in enumerate(self.categories)}
            self._load()
        except BaseException:
            self._file.close()
            raise

    def _load(self) -> None:
        unfinished = noted(self._file)
        for what in unfinished.values():
            self._erase(what)
        users, videos = names(self._file)
        self._arrays = arrays = Arrays(self.dim)
        self._adder = Adder(self._file, arrays)
        self._unsaved = load(self._file, arrays, users, videos)
        # a process that was killed while it forgot may leave nodes without a memory
        N = arrays.nodes
        arrays.node_live[:N] = (arrays.first_in[:N] >= 0) | (arrays.first_out[:N] >= 0)
        held, seen = (set(np.unique(column[: arrays.rows]).tolist()) for column in (arrays.user, arrays.video))
        self._users = {name: id for id, name in users.items() if id in held}
        self._videos = {video: id for id, video in videos.items() if id in seen}
        self._latest: dict[tuple[int, int], float] = {}
        for id in self._users.values():
            self._find_latest(id)
        if unfinished or len(self._users) < len(users) or len(self._videos) < len(videos):
            self._later(lambda: self._finish_forgetting(list(unfinished)))
        else:
            self._save_if_due()

    def _find_latest(self, user: int) -> None:
        """Set the newest time of each video of a user."""
        for key in [key for key in self._latest if key[0] == user]:
            del self._latest[key]
        a = self._arrays
        rows = np.flatnonzero(a.live[: a.rows] & (a.user[: a.rows] == user))
        films, at = np.unique(a.video[rows], return_inverse=True)
        newest = np.full(len(films), -np.inf)
        np.maximum.at(newest, at, a.time[rows])
        self._latest |= {(user, film): time for film, time in zip(films.tolist(), newest.tolist(), strict=True)}

    def _ready(self) -> None:
        self._file.check_process()
        if self._closed:
            raise RuntimeError("graph: expected an open one, got one that was closed")

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Let one thread write, but not amid its own batch."""
        with self._writing:
            self._ready()
            if self._batching:
                raise RuntimeError(f"{name}: expected to be called outside a batch")
            yield

    def _owner(self, user: str | None) -> int | None:
        """Return the number of a user, None for one of whom nothing is remembered."""
        return self._users.get(self.user if user is None else check.text("user", user, check.MAX_NAME))

    def _embed(self, name: str, text: str) -> np.ndarray:
        if self._encoder is None:
            raise ValueError(f"{name}: expected a vector, or a graph with an encoder, got text alone")
        return check.unit(f"encoder, of {name}", self._encoder.encode([text]), self.dim)

    # adding

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Add many memories in one transaction: all of them are kept, and found, once the block ends, or none."""
        with self._alone("batch"):
            counts = self._arrays.nodes, self._arrays.rows
            self._batching = True
            try:
                with self._file.transaction():
                    yield
            except BaseException:
                with self._reading:
                    self._arrays.truncate(*counts)
                for undo in reversed(self._undo):
                    undo()
                raise
            else:
                with self._reading:
                    self._unsaved += self._arrays.rows - counts[1]
                    self._arrays.visible = self._arrays.rows
                self._save_if_due()
            finally:
                self._batching = False
                self._undo.clear()

    def add(
        self,
        subject: str,
        predicate: str,
        object: str,
        category: str,
        caption: str,
        *,
        time: float,
        vector: Tensor | np.ndarray | None = None,
        mean: Tensor | None = None,
        nearest: Tensor | None = None,
        picture: bytes | None = None,
        valid_from: float | None = None,
        valid_to: float = float("inf"),
        video: str | None = None,
        seconds: float | None = None,
        frame: int | None = None,
        user: str | None = None,
        rule: AddRule = "keep",
        threshold: float = 0.9,
    ) -> int:
        """Remember a fact, and return the memory's id.

        Args:
            subject: The node that the fact leads from, "I".
            predicate: The relation, "keep snacks in".
            object: The node that the fact is about, "the car".
            category: Name of one of `categories`.
            caption: The fact as a sentence.
            time: Seconds on the user's clock; within one video it does not go back.
            vector: `[dim]`, the caption's vector; it is scaled to length 1. None lets the encoder make it.
            mean: Mean visual tokens `[..., D]`, float32, float16 or bfloat16.
            nearest: Visual tokens of the frame nearest to the mean.
            picture: That frame as the bytes of a JPEG, PNG or WebP file.
            valid_from: Seconds from which on the fact is true; default `time`.
            valid_to: Seconds until which it is true.
            video: Name of the video.
            seconds: Seconds in that video.
            frame: Index of the frame in that video.
            user: Whose memory it is; default the graph's user.
            rule: `"keep"`: a label is one node of the user, and every fact is kept. `"perstream"`: PerStream's
                find-or-create, by equal label or else by the cosine of labels, within the category; a fact about an
                object that exists already loses its caption and its pictures. `"perstream-duplicates"`: every fact
                gets two new nodes.
            threshold: Least cosine of labels that are one node, for rule `"perstream"`.

        Returns:
            Id of the memory. By rule `"perstream"` that of the object, which may be an older one.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument is empty, not finite, of another shape, an unknown category, or a time before the
                newest of its video. Nothing is stored then.
            OSError: The disk does not take it. Nothing is stored then.
        """
        self._ready()
        if rule not in ADD_RULES:
            raise ValueError(f"rule: expected one of {', '.join(ADD_RULES)}, got {rule!r}")
        for name, text in (("subject", subject), ("predicate", predicate), ("object", object)):
            check.text(name, text, check.MAX_NAME)
        kind = self._category(category)
        check.text("caption", caption)
        when = check.number("time", time)
        start = when if valid_from is None else check.number("valid_from", valid_from, infinite=True)
        end = check.number("valid_to", valid_to, infinite=True)
        if end < start:
            raise ValueError(f"valid_to: expected at least valid_from, {start}, got {end}")
        owner = self.user if user is None else check.text("user", user, check.MAX_NAME)
        film = None if video is None else check.text("video", video, check.MAX_NAME)
        position = None if seconds is None else check.number("seconds", seconds)
        index = None if frame is None else check.count("frame", frame, 0, 2**62)
        visual: Visual = {}
        for name, tokens in (("nearest", nearest), ("mean", mean)):
            if tokens is not None:
                visual[name] = tokens_of(name, tokens)
        if picture is not None:
            visual["picture"] = picture_of(picture)
        unit = self._embed("caption", caption) if vector is None else check.unit("vector", vector, self.dim)
        labels = None if rule == "keep" else (self._embed("subject", subject), self._embed("object", object))
        with self._writing, nullcontext() if self._batching else self.batch(), self._reading:
            whose = self._number(self._users, owner, "INSERT INTO user (name) VALUES (?)", (owner,))
            source = None
            if film is not None:
                sql = "INSERT INTO video (user, name) VALUES (?, ?)"
                source = self._number(self._videos, (whose, film), sql, (whose, film))
            clock = whose, -1 if source is None else source
            if when < self._latest.get(clock, -np.inf):
                of = f"user {owner!r}" if film is None else f"video {film!r}"
                raise ValueError(f"time: expected at least {self._latest[clock]}, the newest of {of}, got {when}")
            self._set(self._latest, clock, when)
            fact = Fact(
                whose, kind, subject, predicate, object, caption, unit, visual, when, start, end, source, position,
                index,
            )  # fmt: skip
            if labels is None:
                row = self._adder.keep(fact)
            else:
                row = self._adder.perstream(fact, labels, threshold, duplicates=rule == "perstream-duplicates")
            return int(self._arrays.id[row])

    def _number(self, known: dict[Any, int], name: Any, sql: str, values: tuple[Any, ...]) -> int:
        """Return the number of a user or video, written down if it is new."""
        if name not in known:
            self._set(known, name, self._file.writer.execute(sql, values).lastrowid)
        return known[name]

    def _set(self, known: dict[Any, Any], name: Any, value: Any) -> None:
        """Set a value that a transaction which fails takes back."""
        if name in known:
            old = known[name]
            self._undo.append(lambda: known.__setitem__(name, old))
        else:
            self._undo.append(lambda: known.pop(name))
        known[name] = value

    def _category(self, category: object) -> int:
        if not isinstance(category, str):
            raise TypeError(f"category: expected a name, got {type(category).__name__}")
        if category not in self._numbers:
            raise ValueError(f"category: expected one of {', '.join(self._numbers)}, got {category!r}")
        return self._numbers[category]

    # searching

    def search(
        self,
        query: str | Tensor | np.ndarray,
        k: int = 5,
        *,
        delta: float = 0.3,
        walk: int = 256,
        distinct: bool = True,
        category: str | Sequence[str] | None = None,
        since: float | None = None,
        until: float | None = None,
        at: float | None = None,
        user: str | None = None,
        rule: SearchRule = "exact",
    ) -> list[Found]:
        """Find the memories whose captions are most similar to a query, and those that edges lead to from them.

        Args:
            query: A sentence for the encoder, or its vector `[dim]`.
            k: Memories that are taken by their own score, 1 to 1024.
            delta: Least cosine of a memory that is returned.
            walk: Memories that are looked at along the edges, at most; 0 for none.
            distinct: Of memories about the same node whose captions have equal vectors, return the newest alone;
                `Found.seen` counts them. A fact that is seen every day would fill the answer otherwise.
            category: Only memories of these categories.
            since: Only memories seen at this time or later.
            until: Only memories seen before this time.
            at: Only memories that are true at this time.
            user: Whose memories; default the graph's user.
            rule: `"exact"`, or `"perstream"`: its unbounded depth-first walk in its order, without filters.

        Returns:
            By `"exact"`, best first; equal scores in the order of adding. At most k, and those of the walk. Empty if
            nothing is remembered. Visits of the memories are counted.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument is out of range, of another shape, or an unknown category or rule.
        """
        self._ready()
        check.count("k", k, 1, 1024)
        check.count("walk", walk, 0, 2**31)
        least = check.number("delta", delta, infinite=True)
        if rule not in ("exact", "perstream"):
            raise ValueError(f"rule: expected exact or perstream, got {rule!r}")
        if rule == "perstream" and not (category is None and since is None and until is None and at is None):
            raise ValueError("rule: expected no filters with perstream, got some")
        if isinstance(query, str):
            vector = self._embed("query", check.text("query", query))
        else:
            vector = check.unit("query", query, self.dim)
        with self._reading:
            passing = self._passing(self._owner(user), category, since, until, at)
            if self._arrays.unsearchable:
                passing.append(self._arrays.searchable[: self._arrays.visible])
            where = np.logical_and.reduce(passing) if passing else None
            if rule == "perstream":
                found = self._perstream(vector, self._best(vector, k, where)[1], least)
                seen = [1] * len(found)
            else:
                found = self._seeds(vector, k, where, least, distinct)
                if walk:
                    found += self._reached(
                        vector, nearby(self._arrays, [row for row, _, _ in found], walk), where, least
                    )
                found, seen = self._newest(found, distinct)
            self._visit([row for row, _, _ in found])
            memories = self._records(np.array([row for row, _, _ in found], np.int64))
            ids = [None if via is None else int(self._arrays.id[via]) for _, _, via in found]
        return [
            Found(memory, score, via, count)
            for memory, (_, score, _), via, count in zip(memories, found, ids, seen, strict=True)
        ]

    def _passing(
        self,
        user: int | None,
        category: str | Sequence[str] | None,
        since: float | None,
        until: float | None,
        at: float | None,
    ) -> list[np.ndarray]:
        """Return masks `[visible]` of the memories that pass each filter."""
        a = self._arrays
        M = a.visible
        parts: list[np.ndarray] = []
        if user is None:
            parts.append(np.zeros(M, np.bool_))
        elif len(self._users) > 1:
            parts.append(a.user[:M] == user)
        if category is not None:
            wanted = [self._category(name) for name in ([category] if isinstance(category, str) else category)]
            passes = np.zeros(len(self._numbers), np.bool_)
            passes[wanted] = True
            parts.append(a.category[:M] == wanted[0] if len(wanted) == 1 else passes[a.category[:M]])
        if since is not None:
            parts.append(a.time[:M] >= check.number("since", since, infinite=True))
        if until is not None:
            parts.append(a.time[:M] < check.number("until", until, infinite=True))
        if at is not None:
            moment = check.number("at", at)
            parts += [a.valid_from[:M] <= moment, a.valid_to[:M] > moment]
        return parts

    def _best(self, vector: np.ndarray, k: int, where: np.ndarray | None) -> tuple[list[float], list[int]]:
        """Return scores and positions of the k most similar memories."""
        M = self._arrays.visible
        with torch.inference_mode():
            best = similarity_topk(
                torch.from_numpy(vector)[None, None],
                torch.from_numpy(self._arrays.vector[:M])[None],
                k,
                metric="dot",
                where=None if where is None else torch.from_numpy(where)[None],
            )
        rows = best.indices[0, 0].tolist()
        scores = best.values[0, 0].tolist()
        count = rows.index(-1) if -1 in rows else k
        return scores[:count], rows[:count]

    def _seeds(self, vector: np.ndarray, k: int, where: np.ndarray | None, least: float, distinct: bool) -> list[_Hit]:
        """Return the k best memories; twins, which have the same node and score, count as one."""
        count = min(4 * k, 1024) if distinct else k
        while True:
            scores, rows = self._best(vector, count, where)
            groups: dict[tuple[float, int], list[int]] = {}
            for row, score in zip(rows, scores, strict=True):
                # equal captions have equal vectors, and equal vectors have equal scores to the bit
                key = score, int(self._arrays.object[row]) if distinct else row
                if key in groups or len(groups) < k:
                    groups.setdefault(key, []).append(row)
                elif score < min(groups)[0]:
                    break
            else:
                # more twins may lie behind the last memory that was looked at
                if distinct and len(rows) == count < 1024:
                    count = min(4 * count, 1024)
                    continue
            # the newest first, since it is the one that a walk is told to come from
            return [
                (row, score, None)
                for (score, _), several in groups.items()
                for row in reversed(several)
                if score >= least
            ]

    def _newest(self, found: list[_Hit], distinct: bool) -> tuple[list[_Hit], list[int]]:
        """Return hits, best first, and the number of twins that each stands for; of twins the newest is returned."""
        groups: dict[tuple[float, int], list[_Hit]] = {}
        for hit in found:
            groups.setdefault((hit[1], int(self._arrays.object[hit[0]]) if distinct else hit[0]), []).append(hit)
        newest = [
            (
                max(row for row, _, _ in twins),
                twins[0][1],
                None if any(via is None for *_, via in twins) else twins[0][2],
            )
            for twins in groups.values()
        ]
        order = sorted(range(len(newest)), key=lambda i: (-newest[i][1], newest[i][0]))
        counts = [len(twins) for twins in groups.values()]
        return [newest[i] for i in order], [counts[i] for i in order]

    def _reached(
        self, vector: np.ndarray, reached: list[tuple[int, int]], where: np.ndarray | None, least: float
    ) -> list[_Hit]:
        hits: list[_Hit] = []
        # the operator gives equal rows equal scores, and takes this many
        for begin in range(0, len(reached), 1024):
            rows, seeds = np.array(reached[begin : begin + 1024]).T
            memory = torch.from_numpy(self._arrays.vector[rows])[None]
            with torch.inference_mode():
                best = similarity_topk(torch.from_numpy(vector)[None, None], memory, len(rows), metric="dot")
            for score, i in zip(best.values[0, 0].tolist(), best.indices[0, 0].tolist(), strict=True):
                row = int(rows[i])
                if score >= least and self._arrays.searchable[row] and (where is None or where[row]):
                    hits.append((row, score, int(seeds[i])))
        return hits

    def _perstream(self, vector: np.ndarray, seeds: list[int], least: float) -> list[_Hit]:
        M = self._arrays.visible
        scores = self._arrays.vector[:M] @ vector
        scores[~self._arrays.searchable[:M]] = np.nan
        return [(row, float(scores[row]), None) for row in perstream_walk(self._arrays, scores, seeds, least)]

    def _visit(self, rows: list[int]) -> None:
        for row in rows:
            self._arrays.visits[row] += 1
            self._visited.add(int(self._arrays.id[row]))
        # a search does not wait for the disk; a crash may lose the last counts
        if len(self._visited) >= 4096:
            self._later(self._save_visits)

    def _records(self, rows: np.ndarray) -> list[PersonalMemory]:
        """Read the texts of memories; the caller holds the lock."""
        a = self._arrays
        ids = a.id[rows].tolist()
        sql = "SELECT id, predicate, caption, seconds, frame FROM memory WHERE id IN"
        texts = {row[0]: row[1:] for row in self._file.rows_of(sql, ids)}
        ends = {*a.subject[rows].tolist(), *a.object[rows].tolist()} - {-1}
        nodes = a.node_id[list(ends)].tolist()
        labels = dict(self._file.rows_of("SELECT id, label FROM node WHERE id IN", nodes))
        films = list({*a.video[rows].tolist()} - {-1})
        videos = dict(self._file.rows_of("SELECT id, name FROM video WHERE id IN", films))
        users, categories = {id: name for name, id in self._users.items()}, list(self._numbers)
        found = []
        for row, id in zip(rows.tolist(), ids, strict=True):
            predicate, caption, seconds, frame = texts[id]
            subject = int(a.subject[row])
            found.append(
                PersonalMemory(
                    id=id,
                    user=users[int(a.user[row])],
                    subject=None if subject < 0 else labels[int(a.node_id[subject])],
                    predicate=predicate,
                    object=labels[int(a.node_id[a.object[row]])],
                    category=categories[a.category[row]],
                    caption=caption,
                    time=float(a.time[row]),
                    valid_from=float(a.valid_from[row]),
                    valid_to=float(a.valid_to[row]),
                    video=videos.get(int(a.video[row])),
                    seconds=seconds,
                    frame=frame,
                    visits=int(a.visits[row]),
                    kept=tuple(name for name, size in zip(GRANULARITIES, a.size[row].tolist(), strict=True) if size),
                    reduced=tuple(name for bit, name in enumerate(GRANULARITIES) if a.reduced[row] >> bit & 1),
                )
            )
        return found

    def memories(
        self,
        *,
        node: str | None = None,
        category: str | Sequence[str] | None = None,
        since: float | None = None,
        until: float | None = None,
        at: float | None = None,
        user: str | None = None,
    ) -> list[PersonalMemory]:
        """Return the memories that pass all filters, in the order of adding; arguments as of `search` and `forget`."""
        self._ready()
        with self._reading:
            owner = self._owner(user)
            passing = [self._arrays.live[: self._arrays.visible], *self._passing(owner, category, since, until, at)]
            if node is not None:
                passing.append(self._touching(self._nodes(owner, node)))
            return self._records(np.flatnonzero(np.logical_and.reduce(passing)))

    def visual(self, id: int, kind: Literal["nearest", "mean", "picture"]) -> Tensor | bytes | None:
        """Return a memory's visual tokens, or the bytes of its picture; None if it has none.

        Raises:
            GraphFileError: The file holds something else.
            ValueError: There is no such memory or kind.
        """
        self._ready()
        if kind not in VISUALS:
            raise ValueError(f"kind: expected one of {', '.join(VISUALS)}, got {kind!r}")
        with self._reading:
            self._row(id)
            return self._file.visual(id, kind)

    @property
    def users(self) -> list[str]:
        """Users of whom something is remembered."""
        self._ready()
        with self._reading:
            return sorted(self._users)

    def __len__(self) -> int:
        with self._reading:
            return int(self._arrays.live[: self._arrays.visible].sum())

    def stats(self) -> GraphStats:
        """Count memories, nodes and bytes."""
        self._ready()
        with self._reading:
            a = self._arrays
            live = a.live[: a.visible]
            users, categories = {id: name for name, id in self._users.items()}, list(self._numbers)
            names = ("", "-vectors", "-wal")
            files = [] if self.path is None else [self.path.with_name(self.path.name + end) for end in names]
            sizes = a.size[: a.visible][live].sum(0).tolist()
            return GraphStats(
                memories=int(live.sum()),
                nodes=int(a.node_live[: a.nodes].sum()),
                edges=int((live & (a.subject[: a.visible] >= 0)).sum()),
                users=_tally(a.user[: a.visible][live], users),
                categories=_tally(a.category[: a.visible][live], dict(enumerate(categories))),
                nbytes=dict(zip(GRANULARITIES, sizes, strict=True)),
                ram=a.nbytes,
                disk=sum(file.stat().st_size for file in files if file.exists()),
            )

    # changing

    def _row(self, id: int) -> int:
        a = self._arrays
        check.count("id", id, -(2**63), 2**63 - 1)
        row = int(np.searchsorted(a.id[: a.visible], id))
        if row >= a.visible or a.id[row] != id or not a.live[row]:
            raise ValueError(f"id: expected that of a memory, got {id}")
        return row

    def _nodes(self, user: int | None, label: str) -> list[int]:
        """Return the ids of a user's nodes of a label."""
        check.text("node", label, check.MAX_NAME)
        found = self._file.node_ids(user, label) if user is not None else []
        a = self._arrays
        return [id for id in found if a.node_live[np.searchsorted(a.node_id[: a.nodes], id)]]

    def _touching(self, nodes: list[int]) -> np.ndarray:
        a = self._arrays
        at = np.searchsorted(a.node_id[: a.nodes], nodes)
        return np.isin(a.subject[: a.visible], at) | np.isin(a.object[: a.visible], at)

    def expire(self, id: int, time: float) -> None:
        """End the truth of a memory at a time; it stays, and `at=` finds it for moments before.

        Raises:
            ValueError: There is no such memory, or the time is before its `valid_from`.
        """
        end = check.number("time", time, infinite=True)
        with self._alone("expire"), self._reading:
            row = self._row(id)
            if end < self._arrays.valid_from[row]:
                raise ValueError(f"time: expected at least valid_from, {self._arrays.valid_from[row]}, got {end}")
            with self._file.transaction() as writer:
                writer.execute("UPDATE memory SET valid_to = ? WHERE id = ?", (end, id))
            self._arrays.valid_to[row] = end

    def forget(
        self,
        *,
        user: str | None = None,
        node: str | None = None,
        category: str | None = None,
        video: str | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> int:
        """Forget the memories that meet all conditions, and return their number.

        No search finds them once this returns, also after a crash. Rows, vectors, pictures, the snapshot and free pages
        are overwritten in the background; `settle` waits for this, `close` does too. Adding waits while the file is
        rewritten. Nodes that nothing is about any more are forgotten as well.

        Args:
            user: Whose memories; alone, everything of this user. Default the graph's user.
            node: Memories that begin or end at this node.
            category: Memories of this category.
            video: Memories of this video.
            since: Memories seen at this time or later.
            until: Memories seen before this time.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: No condition is given, or one cannot be.
        """
        if all(condition is None for condition in (user, node, category, video, since, until)):
            raise ValueError("forget: expected a user, node, category, video, since or until, got none")
        kind = None if category is None else self._category(category)
        begin = None if since is None else check.number("since", since, infinite=True)
        end = None if until is None else check.number("until", until, infinite=True)
        with self._alone("forget"), self._reading:
            owner = self._owner(user)
            nodes = [] if node is None else self._nodes(owner, node)
            if video is not None:
                check.text("video", video, check.MAX_NAME)
            film = None if owner is None or video is None else self._videos.get((owner, video))
            if owner is None or (node is not None and not nodes) or (video is not None and film is None):
                return 0
            newest = int(self._arrays.id[self._arrays.rows - 1])
            what = Forgetting(newest, owner, nodes, kind, film, begin, end)
            rows = what.rows(self._arrays)
            if not len(rows):
                return 0
            number = note(self._file, what)
            self._arrays.drop_rows(rows)
            visited = np.array(list(self._visited), np.int64)
            self._visited.difference_update(visited[np.isin(visited, self._arrays.id[rows])].tolist())
            self._forget_names(owner)
        self._later(lambda: self._erase(what))
        self._later(lambda: self._finish_forgetting([number]))
        return len(rows)

    def _forget_names(self, user: int) -> None:
        """Drop the names that nothing is remembered under any more."""
        self._find_latest(user)
        left = {film for owner, film in self._latest if owner == user}
        self._videos = {name: id for name, id in self._videos.items() if name[0] != user or id in left}
        if not left:
            self._users = {name: id for name, id in self._users.items() if id != user}

    def _erase(self, what: Forgetting) -> None:
        last: int | None = 0
        while last is not None:
            with self._writing:
                last = erase_some(self._file, what, last)

    def _finish_forgetting(self, numbers: list[int]) -> None:
        with self._writing:
            with self._reading:
                a = self._arrays
                dead = np.flatnonzero(~a.live[: a.rows])
                for begin in range(0, len(dead), 4096):
                    a.vector[dead[begin : begin + 4096]] = 0
                nodes = a.node_id[: a.nodes][~a.node_live[: a.nodes]].tolist()
                users, videos = list(self._users.values()), list(self._videos.values())
                if len(dead) > 4096 and len(dead) > a.rows // 2:
                    a.compact()
            tidy(self._file, nodes, users, videos)
            self._file.scrub()
        self._save_vectors()
        with self._writing, self._file.transaction():
            self._file.delete("forgetting", numbers)

    def reduce(self, target: int, *, rule: ReduceRule = "value") -> Reduced:
        """Free bytes by removing granularities of memories; labels, relations, times and provenance stay.

        Args:
            target: Bytes to free, of all users; the last removal may free more.
            rule: `"value"`: the least valuable bytes first. `"nsbg"`: the least visited memory loses everything, then
                the next. `"gsbn"`: every memory loses its nearest tokens, the least visited first, then its mean
                tokens, then vectors, then captions. Both are PerStream's.

        Raises:
            TypeError: `target` is not an integer.
            ValueError: `target` is negative, or the rule unknown.
        """
        check.count("target", target, 0, 2**62)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        with self._alone("reduce"), self._reading:
            a = self._arrays
            rows = np.flatnonzero(a.live[: a.rows])
            size = a.size[rows]
            removed = RULES[rule](size, a.visits[rows], target)
            ids = a.id[rows]
            with self._file.transaction():
                for granularity, kinds in ((NEAREST, ("nearest", "picture")), (MEAN, ("mean",))):
                    for kind in kinds:
                        self._file.delete("visual", 4 * ids[removed[:, granularity]] + VISUALS.index(kind))
                for granularity, column in ((VECTOR, "vector"), (CAPTION, "caption")):
                    self._file.clear(column, ids[removed[:, granularity]])
                lost = removed.any(1)
                marks = a.reduced[rows] | (removed @ (1 << np.arange(4))).astype(np.int8)
                self._file.mark_reduced(marks[lost].tolist(), ids[lost].tolist())
            a.size[rows], a.reduced[rows] = np.where(removed, 0, size), marks
            gone = rows[removed[:, VECTOR]]
            a.searchable[gone] = False
            a.vector[gone] = 0
            a.unsearchable += len(gone)
        if removed.any():
            self._later(lambda: self._finish_forgetting([]))
        counts = dict(zip(GRANULARITIES, removed.sum(0).tolist(), strict=True))
        return Reduced(
            int(size[removed].sum()),
            int(removed.any(1).sum()),
            {name: count for name, count in counts.items() if count},
        )

    # the background

    def _later(self, task: Callable[[], None]) -> None:
        with self._queueing:
            self._tasks = [waiting for waiting in self._tasks if not waiting.done() or waiting.exception()]
            self._tasks.append(self._worker.submit(task))

    def _save_if_due(self) -> None:
        # a share of all, so that each vector is written a few times in a graph's life
        if self.path is not None and self._unsaved > max(SNAPSHOT_FROM, self._arrays.rows // 4):
            self._unsaved = 0
            self._later(self._save_vectors)

    def _save_vectors(self) -> None:
        if self.path is None:
            return
        path = snapshot_path(self.path)
        with self._reading:
            a = self._arrays
            ids = a.id[: a.visible][a.searchable[: a.visible]]
        if len(ids) <= SNAPSHOT_FROM and not path.exists():
            return

        def block(some: np.ndarray) -> np.ndarray:
            with self._reading:
                a = self._arrays
                return a.vector[np.searchsorted(a.id[: a.visible], some)]

        write_vectors(path, self._file.about["uuid"], self.dim, ids, block)

    def _save_visits(self) -> None:
        with self._writing:
            with self._reading:
                a = self._arrays
                ids = np.array(sorted(self._visited), np.int64)
                counts = a.visits[np.searchsorted(a.id[: a.visible], ids)].tolist() if len(ids) else []
                self._visited.clear()
            with self._file.transaction():
                self._file.count_visits(counts, ids.tolist())

    def settle(self) -> None:
        """Wait until the file is what was asked for: forgotten bytes are overwritten, visits are stored.

        Raises:
            OSError: The disk did not take it; what was forgotten is erased when the file is opened again.
        """
        with self._alone("settle"):
            self._later(self._save_visits)
        with self._queueing:
            tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()

    def close(self) -> None:
        """Settle, and give the file free; a second call does nothing."""
        if self._closed:
            return
        with self._alone("close"):
            pass
        try:
            self.settle()
        finally:
            self._closed = True
            self._worker.shutdown()
            self._file.close()

    def __enter__(self) -> MemoryGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tally(numbers: np.ndarray, names: dict[int, str]) -> dict[str, int]:
    """Count how often each named number occurs, the most frequent first."""
    found, counts = np.unique(numbers, return_counts=True)
    pairs = sorted(zip(found.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
    return {names[number]: count for number, count in pairs}
