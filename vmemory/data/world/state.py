"""The state of a world, second by second, out of one seed."""

from __future__ import annotations

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np

from vmemory.data.world.render import Sight, render
from vmemory.data.world.words import COLOURS, NUMBERS, PLACES, SHAPES, SPLITS

# a change of what a seed makes is another world: the number is part of every seed
VERSION = 1
# tiles along each side of the picture; cards keep to the upper three rows, numbers to the last
TILES = 4
_PATHS = [(0, *rest) for rest in permutations(range(1, 6))]
# of ten kinds of layout, those of each split
_LAYOUTS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
# cards from which on some colours and shapes come only once, so that long streams have questions about them
_MANY = 8
_MOST_SECONDS = 7 * 24 * 3600


class Card(NamedTuple):
    """A coloured card with a black shape, seen in the seconds `start <= t < stop`; places in `COLOURS`, `SHAPES`."""

    start: int
    stop: int
    colour: int
    shape: int

    @property
    def name(self) -> str:
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


class Number(NamedTuple):
    """A number shown in the seconds `start <= t < stop`."""

    start: int
    stop: int
    value: int


class World:
    """A stream that nobody filmed: what it shows at each second is known exactly.

    Five places follow each other by cuts. In each half of the picture coloured cards with a black shape come, hop from
    tile to tile and go; a number appears now and then in the last row. In still stretches not a pixel changes. Cards
    that are seen together, or follow each other, differ in colour and in shape. Where there are eight cards or more,
    two of the colours and two of the shapes come only once.

    The order in which a half's tiles are visited is the half's path, and the two paths are the world's layout. Layouts
    and seeds of different splits are disjoint.

    Args:
        seed: Which world, 0 … 2³² - 1.
        seconds: How long it lasts, whole seconds.
        split: `"train"`, `"validation"` or `"test"`.
        pace: Stays and gaps are so many times as long.

    Attributes:
        cards: `Card`s in order of their start; of two that start together, the left one first.
        numbers: `Number`s in order of their start.
        layout: Places of the two halves' paths among the 120 orders of six tiles.
        place: `[seconds]`, place in `PLACES`.
        card: `[seconds, 2]`, place in `cards` of what the left and the right half show, -1 for nothing.
        tile: `[seconds, 2]`, where that is: `row * 4 + column`, -1 for nothing.
        number: `[seconds]`, place in `numbers`, -1 for none.
        number_tile: `[seconds]`, where that is, -1 for none.
        still: `[seconds]` bool, seconds that show the picture of the second before.

    Raises:
        TypeError, ValueError: A bad argument.
    """

    def __init__(self, seed: int, seconds: int, *, split: str = "train", pace: float = 1.0) -> None:
        check_whole("seed", seed, 0, 2**32 - 1)
        check_whole("seconds", seconds, 1, _MOST_SECONDS)
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if not (math.isfinite(pace) and 0.01 <= pace <= 1000):
            raise ValueError(f"pace: expected a number from 0.01 to 1000, got {pace}")
        self.seed, self.seconds, self.split, self.pace = seed, seconds, split, float(pace)
        words = np.random.SeedSequence([VERSION, SPLITS.index(split), seed]).generate_state(8)
        # the numbers that RandomState draws are the same in every release of numpy
        rng = np.random.RandomState(words)
        self.layout = _layout(rng, split)
        self._clock = _clock(rng, seconds, self.pace)
        self.still = np.diff(self._clock, prepend=-1) == 0
        length = int(self._clock[-1]) + 1
        place = _places(rng, length, self.pace)
        spans = _card_spans(rng, length, self.pace)
        looks = _looks(rng, spans)
        card, tile = np.full((length, 2), -1), np.full((length, 2), -1)
        for i, (start, stop, half) in enumerate(spans):
            hold, first, path = rng.randint(2, 6), rng.randint(6), _PATHS[self.layout[half]]
            stops = [path[(first + k // hold) % 6] for k in range(stop - start)]
            card[start:stop, half] = i
            tile[start:stop, half] = [at // 2 * TILES + 2 * half + at % 2 for at in stops]
        shown, values, columns = _numbers(rng, length, self.pace)
        self._shift = rng.randint(3, size=(length, 2, 2))
        self.cards = [Card(self._second(a), self._second(b), *looks[i]) for i, (a, b, _) in enumerate(spans)]
        self.numbers = [Number(self._second(a), self._second(b), v) for (a, b), v in zip(shown, values, strict=True)]
        number, number_tile = np.full(length, -1), np.full(length, -1)
        for i, (a, b) in enumerate(shown):
            number[a:b], number_tile[a:b] = i, (TILES - 1) * TILES + columns[i]
        self.place, self.card, self.tile = place[self._clock], card[self._clock], tile[self._clock]
        self.number, self.number_tile = number[self._clock], number_tile[self._clock]

    def _second(self, live: int) -> int:
        """Return the first second that shows a second of the clock that stops while the picture is still."""
        return int(np.searchsorted(self._clock, live))

    def box(self, second: int, half: int) -> list[float]:
        """Return `[x1, y1, x2, y2]` of the tile in which a half shows a card, from 0 to 1 of the picture.

        The card's own edges lie within one pixel of it.

        Raises:
            ValueError: The half is empty then.
        """
        tile = int(self.tile[second, half])
        if tile < 0:
            raise ValueError(f"half: expected one that shows a card at second {second}, got {half}")
        row, column = divmod(tile, TILES)
        return [x / TILES for x in (column, row, column + 1, row + 1)]

    def render(self, times: np.ndarray | list[float] | None = None) -> np.ndarray:
        """Draw pictures, uint8 RGB `[n, 64, 64, 3]`.

        Args:
            times: `[n]` seconds, fractions too; None = every second.

        Raises:
            ValueError: Times outside of the world.
        """
        at = np.arange(self.seconds, dtype=np.float64) if times is None else np.asarray(times, np.float64).reshape(-1)
        if len(at) and not (at.min() >= 0 and at.max() < self.seconds):
            raise ValueError(f"times: expected seconds from 0 to below {self.seconds}, got {at.min()} to {at.max()}")
        return render([self._sight(float(time)) for time in at], self.seed)

    def _sight(self, time: float) -> Sight:
        second = int(time)
        live = int(self._clock[second])
        last = second + 1 < self.seconds and self.still[second + 1]
        # the picture stands from the beginning of the second that the still stretch repeats
        moment = float(live) if self.still[second] or last else live + time - second
        cards = []
        for half in (0, 1):
            if self.card[second, half] >= 0:
                look = self.cards[self.card[second, half]]
                dy, dx = self._shift[live, half]
                cards.append((int(self.tile[second, half]), look.colour, look.shape, int(dy), int(dx)))
        number = self.number[second]
        digit = None if number < 0 else (int(self.number_tile[second]) % TILES, self.numbers[number].value)
        return Sight(moment, int(self.place[second]), cards, digit)


def check_whole(name: str, value: int, least: int, most: int) -> None:
    """Check that an argument is a whole number of a range; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def _layout(rng: np.random.RandomState, split: str) -> tuple[int, int]:
    left, kinds = rng.randint(len(_PATHS)), _LAYOUTS[split]
    fitting = [right for right in range(len(_PATHS)) if (left + right) % 10 in kinds]
    return int(left), fitting[rng.randint(len(fitting))]


def _between(rng: np.random.RandomState, low: int, high: int, pace: float) -> int:
    """Draw `low` to below `high` seconds at a pace, at least one."""
    return max(1, int(rng.randint(low, high) * pace))


def _clock(rng: np.random.RandomState, seconds: int, pace: float) -> np.ndarray:
    """Draw, for each second, the second of the clock that stops while the picture is still."""
    runs = np.ones(seconds, np.int64)
    at = _between(rng, 30, 120, pace)
    while at < seconds:
        stop = at + _between(rng, 5, 16, pace)
        runs[at:stop] = 0
        at = stop + _between(rng, 60, 180, pace)
    runs[0] = 0
    return np.cumsum(runs)


def _places(rng: np.random.RandomState, length: int, pace: float) -> np.ndarray:
    place, at, here = np.zeros(length, np.int64), 0, rng.randint(len(PLACES))
    while at < length:
        stop = at + _between(rng, 25, 90, pace)
        place[at:stop] = here
        here, at = (here + rng.randint(1, len(PLACES))) % len(PLACES), stop
    return place


def _card_spans(rng: np.random.RandomState, length: int, pace: float) -> list[tuple[int, int, int]]:
    """Draw when and where cards come, `(start, stop, half)` in order."""
    spans = []
    for half in (0, 1):
        at = int(rng.randint(0, 13) * pace) + half * int(rng.randint(0, 21) * pace)
        while at < length:
            stop = at + max(2, _between(rng, 5, 30, pace))
            spans.append((at, min(stop, length), half))
            at = stop + _between(rng, 2, 25, pace)
    return sorted(spans, key=lambda span: (span[0], span[2]))


def _looks(rng: np.random.RandomState, spans: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Draw colour and shape of each card."""
    colours, shapes = rng.permutation(len(COLOURS)).tolist(), rng.permutation(len(SHAPES)).tolist()
    once: dict[int, tuple[int | None, int | None]] = {}
    if len(spans) >= _MANY:
        rare = rng.permutation(len(spans))[:4].tolist()
        for i in (0, 1):
            once[rare[i]] = (colours.pop(), None)
            once[rare[2 + i]] = (None, shapes.pop())
    looks: list[tuple[int, int]] = []
    for i, (start, _, _) in enumerate(spans):
        others = [looks[j] for j in range(i) if j == i - 1 or spans[j][1] > start]
        taken = ({look[0] for look in others}, {look[1] for look in others})
        fixed = once.get(i, (None, None))
        look = [
            _pick(rng, [x for x in known if x not in gone]) if given is None else given
            for given, known, gone in zip(fixed, (colours, shapes), taken, strict=True)
        ]
        looks.append((look[0], look[1]))
    return looks


def _pick(rng: np.random.RandomState, of: list[int]) -> int:
    return of[rng.randint(len(of))]


def _numbers(
    rng: np.random.RandomState, length: int, pace: float
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Draw spans, values and columns of the numbers."""
    spans: list[tuple[int, int]] = []
    values: list[int] = []
    at, value = int(rng.randint(0, 21) * pace), rng.randint(len(NUMBERS))
    while at < length:
        stop = at + max(2, _between(rng, 3, 9, pace))
        spans.append((at, min(stop, length)))
        values.append(int(value))
        value = (value + rng.randint(1, len(NUMBERS))) % len(NUMBERS)
        at = stop + _between(rng, 8, 40, pace)
    return spans, values, rng.randint(TILES, size=len(spans)).tolist()
