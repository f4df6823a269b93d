"""Eyes for a world: what a picture shows by its pixels, and answers out of nothing but such readings."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

PLACES = {
    "room": (120, 110, 100), "garden": (70, 110, 60), "night": (25, 25, 55), "desert": (190, 160, 110),
    "beach": (110, 150, 180),
}  # fmt: skip
COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 220, 50),
    "purple": (150, 50, 180), "orange": (245, 140, 30), "cyan": (60, 210, 220), "white": (240, 240, 240),
}  # fmt: skip
# dots of the digits that differ in every pair of them: (row, column) of five by seven
DIGITS = {
    "01110100011001110101110011000101110": "0", "00100011000010000100001000010001110": "1",
    "01110100010000100110010001000011111": "2", "01110100010000100110000011000101110": "3",
    "00010001100101010010111110001000010": "4", "11111100001111000001000011000101110": "5",
    "00110010001000011110100011000101110": "6", "11111000010001000100010000100001000": "7",
    "01110100011000101110100011000101110": "8", "01110100011000101111000010001001100": "9",
}  # fmt: skip


class Reading(NamedTuple):
    """Place, (colour, shape, box) of the left and the right half, and the number of one picture."""

    place: str
    cards: tuple[tuple[str, str, str] | None, tuple[str, str, str] | None]
    number: str | None


def read(picture: np.ndarray, tolerance: float = 0.0) -> Reading:
    """What a picture `[64, 64, 3]` shows. Palettes are met to within `tolerance`."""
    pixels = picture.astype(np.float64)
    tiles = pixels.reshape(4, 16, 4, 16, 3).swapaxes(1, 2)
    halves: list[tuple[str, str, str] | None] = [None, None]
    free = []
    for row in range(4):
        for column in range(4):
            tile = tiles[row, column]
            colour = _plate(tile, tolerance)
            if row < 3 and colour is not None:
                assert halves[column // 2] is None, "two cards in one half"
                box = [column / 4, row / 4, (column + 1) / 4, (row + 1) / 4]
                halves[column // 2] = (colour, _shape(1 - tile.sum(-1) / sum(COLOURS[colour])), str(box))
            elif row < 3:
                free.append(tile.reshape(-1, 3))
    seen = np.median(np.concatenate(free), 0)
    place = min(PLACES, key=lambda name: float(np.abs(seen - PLACES[name]).sum()))
    shown = [
        tile for tile in tiles[3] if abs(tile[0].mean() - 15) <= max(2, tolerance) and np.ptp(tile[0]) <= tolerance
    ]
    assert len(shown) <= 1
    return Reading(place, (halves[0], halves[1]), _digit(shown[0]) if shown else None)


def _plate(tile: np.ndarray, tolerance: float) -> str | None:
    corners = tile[[2, 2, 13, 13], [2, 13, 2, 13]]
    for name, colour in COLOURS.items():
        if np.abs(corners - np.array(colour)).max() <= tolerance:
            return name
    return None


def _shape(dark: np.ndarray) -> str:
    """Which shape a tile `[16, 16]` shows, from how black its pixels are."""
    dark = np.where(dark > 0.5, 1.0, 0.0)
    dark[[0, -1]] = dark[:, [0, -1]] = 0
    ys, xs = np.nonzero(dark)
    y, x = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    if not dark[int(y), int(x)]:
        return "ring"
    top, bottom = dark[: int(np.ceil(y))].sum(), dark[int(np.floor(y)) + 1 :].sum()
    if bottom > 1.5 * top:
        return "triangle"
    own = dark[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    quarter = len(own) // 4
    if not own[quarter, quarter]:
        return "cross"
    return "square" if own.mean() > 0.95 else "circle" if own.mean() > 0.65 else "diamond"


def _digit(tile: np.ndarray) -> str:
    dots = tile[1:15, 3:13].mean(-1).reshape(7, 2, 5, 2).mean((1, 3)) > 128
    return DIGITS["".join("1" if dot else "0" for dot in dots.flatten())]


class Visit(NamedTuple):
    first: int
    last: int
    name: str


def visits(readings: list[Reading]) -> list[Visit]:
    """Cards in order of first sight: what a half shows without a break."""
    out = []
    for half in (0, 1):
        before = None
        for i, reading in enumerate(readings):
            card = reading.cards[half]
            name = None if card is None else f"{card[0]} {card[1]}"
            if name is not None and name == before:
                out[-1] = out[-1]._replace(last=i)
            elif name is not None:
                out.append(Visit(i, i, name))
            before = name
    return sorted(out)


def answer(text: str, readings: list[Reading], seconds: list[int]) -> str:
    """The answer to a question about pictures, the last of which is now."""
    now, seen = readings[-1], visits(readings)
    cards = [card for card in now.cards if card is not None]
    numbers = [reading.number for reading in readings]
    told = [number for number in numbers if number is not None]
    name = (re.search(r"(?:the|a) (\w+ \w+)(?: now| come)?\?", text) or [None, None])[1]
    match = [i for i, visit in enumerate(seen) if visit.name == name]
    if text == "Where are we now?":
        return now.place
    if text == "What number is shown now?":
        assert now.number is not None
        return now.number
    if text == "What number was shown last?":
        assert now.number is None
        return told[-1]
    if text == "What number was shown first?":
        return told[0]
    if found := re.fullmatch(r"What colour is the (\w+) now\?", text):
        return _only(colour for colour, shape, _ in cards if shape == found[1])
    if found := re.fullmatch(r"What is (\w+) now\?", text):
        return _only(shape for colour, shape, _ in cards if colour == found[1])
    if re.match("What is the box", text):
        return _only(box for colour, shape, box in cards if f"{colour} {shape}" == name)
    if found := re.fullmatch(r"What colour was the (\w+)\?", text):
        return _only(visit.name.split()[0] for visit in seen if visit.name.split()[1] == found[1])
    if found := re.fullmatch(r"What was (\w+)\?", text):
        return _only(visit.name.split()[1] for visit in seen if visit.name.split()[0] == found[1])
    if found := re.fullmatch(r"How many (\w+) cards were there\?", text):
        return str(sum(visit.name.split()[0] == found[1] for visit in seen))
    if text.startswith("Was there"):
        return "yes" if match else "no"
    visit = seen[_only(match)]
    if text.startswith("Where were we"):
        return _only({reading.place for reading in readings[visit.first : visit.last + 1]})
    if text.startswith("What was the last box"):
        return _only(card[2] for card in readings[visit.last].cards if card and f"{card[0]} {card[1]}" == name)
    if text.startswith("At which second"):
        return str(seconds[visit.first])
    if text.startswith("What came after"):
        later = [other.first for other in seen if other.first > visit.first]
        return _only(other.name for other in seen if other.first == min(later))
    if text.startswith("What came before"):
        earlier = [other.first for other in seen if other.first < visit.first]
        return _only(other.name for other in seen if other.first == max(earlier))
    raise AssertionError(f"nobody knows how to answer {text!r}")


def _only(found):
    found = list(found)
    assert len(found) == 1, f"expected one answer, got {found}"
    return found[0]
