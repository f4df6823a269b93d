"""Bounded key-value caches for language models."""

from vmemory.kv.memory import POLICIES, KVMemory

__all__ = ["POLICIES", "KVMemory"]
