"""The table of memories."""

from __future__ import annotations

from typing import Any

from vmemory.banks.bank import Bank
from vmemory.banks.dual import DualMemory
from vmemory.banks.episodic import EpisodicBank
from vmemory.banks.hierarchical import HierarchicalBank
from vmemory.banks.reservoir import ReservoirBank
from vmemory.banks.single import MergingBank, RingBank, UniformBank

# a new policy is one class and one line here; the shared contract tests run on all of them
POLICIES: dict[str, type[Bank] | type[DualMemory]] = {
    bank.policy: bank
    for bank in (HierarchicalBank, MergingBank, UniformBank, RingBank, EpisodicBank, ReservoirBank, DualMemory)
}


def make(policy: str, **arguments: Any) -> Any:
    """A memory by its policy's name: a `Bank`, or for `"dual"` a `DualMemory`.

    Raises:
        ValueError: No such policy, or an argument does not fit.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    return POLICIES[policy](**arguments)
