"""Records that a graph returns."""

from __future__ import annotations

from dataclasses import dataclass

from vmemory.graph.arrays import GRANULARITIES


@dataclass(frozen=True)
class PersonalMemory:
    """One memory: a fact about an object, with the moment at which it was seen.

    Attributes:
        id: Its number in the graph's file, never used again.
        user: Whose memory it is.
        subject: The node that the fact leads from, or None.
        predicate: The relation of subject and object, or None.
        object: The node that the fact is about.
        category: Name of its category.
        caption: The sentence, or None if it was removed to save bytes, or if the memory is an edge alone.
        time: Seconds on the user's clock.
        valid_from: Seconds from which on it is true.
        valid_to: Seconds until which it is true, infinite if no end is known.
        video: Name of the video that it comes from, or None.
        seconds: Seconds in that video, or None.
        frame: Index of the frame in that video, or None.
        visits: How often a search has returned it.
        kept: Which of `nearest`, `mean`, `vector` and `caption` it has.
        reduced: Which of them `reduce` has removed.
    """

    id: int
    user: str
    subject: str | None
    predicate: str | None
    object: str
    category: str
    caption: str | None
    time: float
    valid_from: float
    valid_to: float
    video: str | None
    seconds: float | None
    frame: int | None
    visits: int
    kept: tuple[str, ...] = GRANULARITIES
    reduced: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The caption, or the fact in words where no caption is kept."""
        return self.caption or " ".join(part for part in (self.subject, self.predicate, self.object) if part)


@dataclass(frozen=True)
class Found:
    """A memory that a search found.

    Attributes:
        memory: The memory.
        score: Cosine of its caption with the query.
        via: Id of the memory from which the walk reached it; None if its own score is among the k best.
        seen: Number of memories that it stands for: itself and its older twins, which say the same about the same node.
    """

    memory: PersonalMemory
    score: float
    via: int | None = None
    seen: int = 1


@dataclass(frozen=True)
class Reduced:
    """The result of a reduction.

    Attributes:
        freed: Bytes.
        memories: Number of memories that lost something.
        removed: Number of memories by granularity that they lost.
    """

    freed: int
    memories: int
    removed: dict[str, int]


@dataclass(frozen=True)
class GraphStats:
    """Counts of a graph.

    Attributes:
        memories: Number of memories, edges without a caption included.
        nodes: Number of nodes.
        edges: Number of memories that lead from one node to another.
        users: Number of memories by user, the most first.
        categories: Number of memories by category, the most first.
        nbytes: Bytes of memories by granularity.
        ram: Bytes of the arrays.
        disk: Bytes of the files.
    """

    memories: int
    nodes: int
    edges: int
    users: dict[str, int]
    categories: dict[str, int]
    nbytes: dict[str, int]
    ram: int
    disk: int
