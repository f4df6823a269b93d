"""Frames spread evenly over everything seen."""

from __future__ import annotations

from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import register_policy


@register_policy
class UniformBank(SingleTierBank):
    """A memory of frames spread evenly over all that was seen, for streams of unknown length.

    A full bank gives up the frame whose neighbours lie closest together, the earliest of equals, never the first.
    """

    policy = "uniform"
    rule = "uniform"
