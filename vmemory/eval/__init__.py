"""Evaluation: questions about streams through many memories, localisation of moments, frozen slots, retrieval."""

from vmemory.eval.cells import Cell, cells_of
from vmemory.eval.evaluate import evaluate
from vmemory.eval.features import Features, video_features
from vmemory.eval.files import file_streams
from vmemory.eval.localization import hit_rate, localize
from vmemory.eval.overwrites import Overwrites, compare_overwrites
from vmemory.eval.retrieval import Ranking, RetrievalHead, RetrievalResult, pool_frames, retrieval_scores
from vmemory.eval.scores import Row, score_rows
from vmemory.eval.streams import Asked, AskedStream, world_stream

__all__ = [
    "Asked",
    "AskedStream",
    "Cell",
    "Features",
    "Overwrites",
    "Ranking",
    "RetrievalHead",
    "RetrievalResult",
    "Row",
    "cells_of",
    "compare_overwrites",
    "evaluate",
    "file_streams",
    "hit_rate",
    "localize",
    "pool_frames",
    "retrieval_scores",
    "score_rows",
    "video_features",
    "world_stream",
]
