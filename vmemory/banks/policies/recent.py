"""The last frames, first in, first out."""

from __future__ import annotations

from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import register_policy


@register_policy
class RecentBank(SingleTierBank):
    """A memory of the last `capacity` frames: first in, first out.

    Source: the baseline of SimpleStream (arXiv 2604.02317) and VLM²'s working memory (arXiv 2511.20644).
    """

    policy = "recent"
    rule = "recent"
