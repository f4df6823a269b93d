"""One file a policy. A new one is a file here and a line below; the contract tests run on it by themselves."""

from __future__ import annotations

from vmemory.banks.policies.episodic import EpisodicBank
from vmemory.banks.policies.hierarchical import HierarchicalBank
from vmemory.banks.policies.merging import MergingBank
from vmemory.banks.policies.recent import RecentBank
from vmemory.banks.policies.reservoir import ReservoirBank
from vmemory.banks.policies.token_merging import TokenMergingBank
from vmemory.banks.policies.uniform import UniformBank

__all__ = [
    "EpisodicBank",
    "HierarchicalBank",
    "MergingBank",
    "RecentBank",
    "ReservoirBank",
    "TokenMergingBank",
    "UniformBank",
]
