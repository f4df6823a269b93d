"""Evaluation: features computed once, how well a memory finds a moment again, and whether its slots freeze."""

from vmemory.eval.features import Features, video_features
from vmemory.eval.localization import hit_rate, localize
from vmemory.eval.overwrites import Overwrites, compare_overwrites

__all__ = ["Features", "Overwrites", "compare_overwrites", "hit_rate", "localize", "video_features"]
