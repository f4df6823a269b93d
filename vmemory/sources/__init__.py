"""Timed frames of video files, pictures, arrays and live cameras."""

from vmemory.sources.key_frames import KeyFrames
from vmemory.sources.live import LiveSource
from vmemory.sources.video import Frame, FrameSource, SourceError

__all__ = ["Frame", "FrameSource", "KeyFrames", "LiveSource", "SourceError"]
