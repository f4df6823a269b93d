"""Memories: bounded, timestamped, all with the methods of `Memory`."""

from __future__ import annotations

from vmemory.banks.adapter import FeatureAdapter
from vmemory.banks.archive.archive import Archive
from vmemory.banks.bank import Bank
from vmemory.banks.config import MemoryConfig
from vmemory.banks.dual.memory import DualMemory
from vmemory.banks.dual.rules import overwrite_entropy
from vmemory.banks.io import BankFile, BankFileError
from vmemory.banks.layout import format_bytes, parse_bytes
from vmemory.banks.loading import load
from vmemory.banks.memory import Memory
from vmemory.banks.policies import (
    EpisodicBank,
    HierarchicalBank,
    MergingBank,
    RecentBank,
    ReservoirBank,
    TokenMergingBank,
    UniformBank,
)
from vmemory.banks.policies.single_tier import SingleTierBank
from vmemory.banks.registry import POLICIES, build_memory, register_policy
from vmemory.banks.results import Entries, MemoryTokens, SearchResult, Tier

__all__ = [
    "POLICIES",
    "Archive",
    "Bank",
    "BankFile",
    "BankFileError",
    "DualMemory",
    "Entries",
    "EpisodicBank",
    "FeatureAdapter",
    "HierarchicalBank",
    "Memory",
    "MemoryConfig",
    "MemoryTokens",
    "MergingBank",
    "RecentBank",
    "ReservoirBank",
    "SearchResult",
    "SingleTierBank",
    "Tier",
    "TokenMergingBank",
    "UniformBank",
    "build_memory",
    "format_bytes",
    "load",
    "overwrite_entropy",
    "parse_bytes",
    "register_policy",
]
