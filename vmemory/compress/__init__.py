"""Modules that remove tokens or frames before they reach a memory."""

from vmemory.compress.adaptive import AdaptiveFrameResampler
from vmemory.compress.arguments import add_tempme_arguments, tempme_from_arguments
from vmemory.compress.arrange import TokenArrangement, tokens_arrange
from vmemory.compress.fragment_merge import FragmentMerge, MergedFragment
from vmemory.compress.pixels import pixel_difference
from vmemory.compress.reduced import ReducedTokens
from vmemory.compress.resampler import FrameResampler
from vmemory.compress.selector import FrameSelector
from vmemory.compress.tempme import MergedClips, MergedVideo, TempMe
from vmemory.compress.tempme_schedule import MergeStep, tempme_schedule
from vmemory.compress.token_difference import PixelDifference, TokenDifference
from vmemory.compress.video import CompressedFrames

__all__ = [
    "AdaptiveFrameResampler",
    "CompressedFrames",
    "FragmentMerge",
    "FrameResampler",
    "FrameSelector",
    "MergeStep",
    "MergedClips",
    "MergedFragment",
    "MergedVideo",
    "PixelDifference",
    "ReducedTokens",
    "TempMe",
    "TokenArrangement",
    "TokenDifference",
    "add_tempme_arguments",
    "pixel_difference",
    "tempme_from_arguments",
    "tempme_schedule",
    "tokens_arrange",
]
