"""Reducers in front of a memory: tokens and frames that need not be kept."""

from vmemory.compress.arrange import TokenArrangement, tokens_arrange
from vmemory.compress.pixels import pixel_difference
from vmemory.compress.reduced import ReducedTokens
from vmemory.compress.token_difference import PixelDifference, TokenDifference

__all__ = [
    "PixelDifference",
    "ReducedTokens",
    "TokenArrangement",
    "TokenDifference",
    "pixel_difference",
    "tokens_arrange",
]
