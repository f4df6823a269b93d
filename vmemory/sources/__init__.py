"""Timed frames of video files, pictures, arrays and live cameras."""

from vmemory.sources.live import LiveSource
from vmemory.sources.video import Frame, FrameSource, SourceError

__all__ = ["Frame", "FrameSource", "LiveSource", "SourceError"]
