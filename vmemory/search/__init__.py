"""Search a video by sentences and pictures, over small encoders and a bounded memory."""

from vmemory.search.encoder import calibrate
from vmemory.search.presets import video_bank
from vmemory.search.video_search import Answer, VideoSearch

__all__ = ["Answer", "VideoSearch", "calibrate", "video_bank"]
