"""Sessions: push the frames of a stream into a bounded memory, and ask a model about them."""

from vmemory.session.group import SessionGroup
from vmemory.session.pool import SessionPool
from vmemory.session.session import VideoSession

__all__ = ["SessionGroup", "SessionPool", "VideoSession"]
