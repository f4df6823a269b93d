"""Memories: bounded, timestamped, under one contract."""

from __future__ import annotations

from vmemory.banks.adapter import FeatureAdapter
from vmemory.banks.archive import Archive
from vmemory.banks.bank import Bank
from vmemory.banks.budget import format_bytes, parse_bytes
from vmemory.banks.config import MemoryConfig
from vmemory.banks.dual import DualMemory
from vmemory.banks.dual_rules import overwrite_entropy
from vmemory.banks.episodic import EpisodicBank
from vmemory.banks.files import BankFile, BankFileError
from vmemory.banks.hierarchical import HierarchicalBank
from vmemory.banks.loading import load
from vmemory.banks.policies import POLICIES, make
from vmemory.banks.reservoir import ReservoirBank
from vmemory.banks.single import MergingBank, RingBank, UniformBank
from vmemory.banks.token_merging import TokenMergingBank
from vmemory.banks.tokens import Entries, MemoryTokens, Retrieved

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
    "MemoryConfig",
    "MemoryTokens",
    "MergingBank",
    "ReservoirBank",
    "Retrieved",
    "RingBank",
    "TokenMergingBank",
    "UniformBank",
    "format_bytes",
    "load",
    "make",
    "overwrite_entropy",
    "parse_bytes",
]
