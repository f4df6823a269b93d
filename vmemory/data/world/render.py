"""Pictures of a world, 64 × 64 RGB, drawn by arithmetic: no fonts, no files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

SIDE, TILE = 64, 16
_COLOURS = np.array(
    [
        (220, 40, 40), (40, 180, 60), (50, 80, 230), (235, 220, 50),
        (150, 50, 180), (245, 140, 30), (60, 210, 220), (240, 240, 240),
    ],
    np.float32,
)  # fmt: skip
_PLACES = np.array([(120, 110, 100), (70, 110, 60), (25, 25, 55), (190, 160, 110), (110, 150, 180)], np.float32)
_SPECK, _PLATE = 90.0, 15.0
_NOISES, _SIGMA = 64, 6.0
# rows of five dots, from above
_DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "01110 10001 00001 00110 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


class Sight(NamedTuple):
    """Contents of one picture.

    Attributes:
        moment: Seconds of the clock that moves the background.
        place: Number of the place.
        cards: `(tile, colour, shape, dy, dx)` each; shifts are 0, 1 or 2 half pixels from half a pixel up and left.
        number: `(column, value)`, or None.
    """

    moment: float
    place: int
    cards: Sequence[tuple[int, int, int, int, int]]
    number: tuple[int, int] | None


def render(sights: Sequence[Sight], seed: int) -> np.ndarray:
    """Draw pictures, uint8 `[n, 64, 64, 3]`."""
    out = np.empty((len(sights), SIDE, SIDE, 3), np.uint8)
    for i, sight in enumerate(sights):
        # a margin of one pixel takes what a card at the edge has beyond it
        canvas = np.zeros((SIDE + 2, SIDE + 2, 3), np.float32)
        picture = canvas[1:-1, 1:-1]
        picture[:] = _backgrounds()[sight.place]
        picture += _noises()[_hash(seed, sight.moment) % _NOISES]
        picture += 8 * np.sin(0.37 * sight.moment)
        for k in (0, 1):
            x = (sight.moment * (1.7 + k) + 13 * k + seed % 17) % SIDE
            y = (sight.moment * (0.9 + 0.6 * k) + 29 * k) % SIDE
            _speck(picture, int(x), int(y))
        for tile, colour, shape, dy, dx in sight.cards:
            plate, figure = _card_masks()[shape, dy, dx]
            row, column = divmod(tile, SIDE // TILE)
            window = canvas[row * TILE : row * TILE + TILE + 2, column * TILE : column * TILE + TILE + 2]
            window += plate[..., None] * (_COLOURS[colour] - window)
            window *= 1 - figure[..., None]
        if sight.number is not None:
            column, value = sight.number
            picture[-TILE:, column * TILE : (column + 1) * TILE] = _digits()[value][..., None]
        out[i] = np.clip(picture + 0.5, 0, 255)
    return out


def _hash(seed: int, moment: float) -> int:
    mixed = (seed * 0x9E3779B97F4A7C15 + round(moment * 1000) * 0xC2B2AE3D27D4EB4F) & (2**64 - 1)
    return (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 >> 32 & 0xFFFF


@cache
def _backgrounds() -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    waves = [12 * np.sin(x / 7 + 2 * place) + 10 * np.sin(y / 9) for place in range(len(_PLACES))]
    return _PLACES[:, None, None, :] + np.stack(waves)[..., None]


@cache
def _noises() -> np.ndarray:
    # RandomState draws the same numbers in every release of numpy
    return (_SIGMA * np.random.RandomState(5).randn(_NOISES, SIDE, SIDE, 3)).astype(np.float32)


def _speck(picture: np.ndarray, x: int, y: int) -> None:
    top, left = max(0, y - 2), max(0, x - 2)
    window = picture[top : y + 3, left : x + 3]
    h, w = window.shape[:2]
    mask = _disc()[top - y + 2 : top - y + 2 + h, left - x + 2 : left - x + 2 + w, None]
    window += mask * (_SPECK - window)


@cache
def _disc() -> np.ndarray:
    y, x = np.mgrid[-2:3, -2:3].astype(np.float32)
    return np.clip(2.2 - np.hypot(x, y) + 0.5, 0, 1)


@cache
def _card_masks() -> np.ndarray:
    """Compute how far plate and figure cover each pixel of a tile and a margin of one: `[shape, dy, dx, 2, 18, 18]`."""
    side = TILE + 2
    out = np.zeros((6, 3, 3, 2, side, side), np.float32)
    y0, x0 = np.mgrid[:side, :side].astype(np.float32) + 0.5 - side / 2
    for dy in range(3):
        for dx in range(3):
            y, x = y0 - (dy - 1) / 2, x0 - (dx - 1) / 2
            plate = np.clip(_PLATE / 2 - np.maximum(abs(x), abs(y)) + 0.5, 0, 1)
            for shape, inside in enumerate(_inside(x, y, 4.6)):
                out[shape, dy, dx] = plate, np.clip(inside + 0.5, 0, 1)
    return out


def _inside(x: np.ndarray, y: np.ndarray, r: float) -> list[np.ndarray]:
    """Measure how many pixels each point lies inside of each shape of radius `r`, in the order of `SHAPES`."""
    far = np.hypot(x, y)
    bar = lambda a, b: np.minimum(0.34 * r - abs(a), r - abs(b))  # noqa: E731
    return [
        r - far,
        0.88 * r - np.maximum(abs(x), abs(y)),
        np.minimum(0.85 * r - y, (y + r) / 2 - abs(x)),
        np.maximum(bar(x, y), bar(y, x)),
        np.minimum(r - far, far - 0.52 * r),
        1.05 * r - abs(x) - abs(y),
    ]


@cache
def _digits() -> np.ndarray:
    """Draw white digits on a black plate, grey levels `[10, 16, 16]`."""
    out = np.full((10, TILE, TILE), 15.0, np.float32)
    for value, rows in enumerate(_DIGITS):
        dots = np.array([[float(dot) for dot in row] for row in rows.split()], np.float32)
        out[value, 1:15, 3:13] += 240 * np.kron(dots, np.ones((2, 2), np.float32))
    return out
