"""Evaluation: video features computed once, and how well a memory finds a moment again."""

from vmemory.eval.features import Features, video_features
from vmemory.eval.localization import hit_rate, localize

__all__ = ["Features", "hit_rate", "localize", "video_features"]
