"""Where frames come from: video files, image directories and arrays, as one timed stream."""

from vmemory.stream.source import Frame, FrameSource, SourceError

__all__ = ["Frame", "FrameSource", "SourceError"]
