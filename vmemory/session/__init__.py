"""A video watched by a model through a bounded memory."""

from vmemory.session.pool import SessionPool
from vmemory.session.session import VideoSession

__all__ = ["SessionPool", "VideoSession"]
