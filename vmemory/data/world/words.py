"""Names of all that a world shows."""

from __future__ import annotations

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLACES = ("room", "garden", "night", "desert", "beach")
NUMBERS = tuple(str(number) for number in range(10))

SPLITS = ("train", "validation", "test")
