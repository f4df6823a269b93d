"""Frames as one timed stream, and a video watched through a bounded memory."""

from vmemory.stream.encoder import calibrate
from vmemory.stream.live import LiveSource
from vmemory.stream.memory_stream import Answer, MemoryStream
from vmemory.stream.pool import SessionPool
from vmemory.stream.session import VideoSession
from vmemory.stream.source import Frame, FrameSource, SourceError
from vmemory.stream.video_bank import video_bank

__all__ = [
    "Answer",
    "Frame",
    "FrameSource",
    "LiveSource",
    "MemoryStream",
    "SessionPool",
    "SourceError",
    "VideoSession",
    "calibrate",
    "video_bank",
]
