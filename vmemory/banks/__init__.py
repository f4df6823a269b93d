"""Memories: bounded, timestamped, under one contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
from vmemory.banks.policies import POLICIES, make
from vmemory.banks.quantized import dtype_of
from vmemory.banks.reservoir import ReservoirBank
from vmemory.banks.single import MergingBank, RingBank, UniformBank
from vmemory.banks.tiers import check_lists
from vmemory.banks.tokens import Entries, MemoryTokens, Retrieved


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Any, BankFile]:
    """The memory that `save` wrote, of the class its policy names, and the file's other contents.

    Raises:
        BankFileError: The file cannot be used; one line says why.
    """
    file = BankFile.read(Path(path))
    try:
        return _made(file, device), file
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # whole, and of this version, but not what `save` writes
        raise BankFileError(f"{path}: {error}") from None


def _made(file: BankFile, device: torch.device | str) -> Any:
    if file.policy == DualMemory.policy:
        return DualMemory.from_file(file, device)
    config = dict(file.config)
    config["dtype"] = dtype_of(str(config["dtype"]))
    bank = make(file.policy, device=device, **config)
    state = type(bank.state)(**file.state)
    bank.check(state)
    check_lists(bank.layout, state.order, state.counter)
    bank.restore(type(state)(*(t.to(device) for t in state)))
    return bank


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
    "UniformBank",
    "format_bytes",
    "load",
    "make",
    "overwrite_entropy",
    "parse_bytes",
]
