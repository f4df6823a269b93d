"""Evaluation: cached features, localisation of moments, frozen slots, text-video retrieval."""

from vmemory.eval.features import Features, video_features
from vmemory.eval.localization import hit_rate, localize
from vmemory.eval.overwrites import Overwrites, compare_overwrites
from vmemory.eval.retrieval import Ranking, RetrievalHead, RetrievalResult, pool_frames, retrieval_scores

__all__ = [
    "Features",
    "Overwrites",
    "Ranking",
    "RetrievalHead",
    "RetrievalResult",
    "compare_overwrites",
    "hit_rate",
    "localize",
    "pool_frames",
    "retrieval_scores",
    "video_features",
]
