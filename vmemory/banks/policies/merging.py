"""Neighbouring frames, merged where they are most alike."""

from __future__ import annotations

from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import register_policy


@register_policy
class MergingBank(SingleTierBank):
    """A memory that merges its most similar neighbouring frames; an entry is the weighted mean of its span.

    A full bank folds the closest pair of list neighbours into one entry before the next frame enters; the entry keeps
    its span, the mean of its times and the number of its frames. With one token a frame and n entries it equals
    MA-LMM's bank of n − 1 and the newest frame beside it; with more tokens `TokenMergingBank` does. A frame with
    non-finite features leaves instead of being merged.

    Source: MA-LMM (arXiv 2404.05726) section 3.2; MovieChat (arXiv 2307.16449) merges neighbours by dot products and
    without weights, as `vmemory.compress.FragmentMerge` does.
    """

    policy = "merging"
    rule = "merge"
