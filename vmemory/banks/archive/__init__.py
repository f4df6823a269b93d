"""Archives: frames that left a memory, kept on the host."""

from vmemory.banks.archive.archive import Archive

__all__ = ["Archive"]
