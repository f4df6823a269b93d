"""The dual memory: working and episodic, read by attention."""

from vmemory.banks.dual.memory import DualMemory

__all__ = ["DualMemory"]
