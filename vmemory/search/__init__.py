"""Search a video by sentences and pictures, over small encoders and a bounded memory."""

from vmemory.search.encoder import calibrate
from vmemory.search.presets import video_bank
from vmemory.search.video_search import Answer, MemoryStream

__all__ = ["Answer", "MemoryStream", "calibrate", "video_bank"]
