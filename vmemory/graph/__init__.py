"""The personal memory graph: facts with captions, vectors, pictures and times, found, reduced and forgotten."""

from vmemory.graph.arguments import TextEncoder
from vmemory.graph.categories import CATEGORIES, Category
from vmemory.graph.file import GraphFileError
from vmemory.graph.gate import perstream_scores
from vmemory.graph.graph import MemoryGraph
from vmemory.graph.records import Found, GraphStats, PersonalMemory, Reduced

__all__ = [
    "CATEGORIES",
    "Category",
    "Found",
    "GraphFileError",
    "GraphStats",
    "MemoryGraph",
    "PersonalMemory",
    "Reduced",
    "TextEncoder",
    "perstream_scores",
]
