"""Questions about a world, and their answers out of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vmemory.data.world.state import Card, Number, World
from vmemory.data.world.words import COLOURS, NUMBERS, PLACES, SHAPES

Span = tuple[float, float]
# the most that a question about a number of cards counts to
MOST = 4


class Question(NamedTuple):
    """A question at `time` seconds.

    `evidence` are the seconds of the first and the last picture that show what the answer names, or the only one that
    shows the answer; None where nothing shows it by itself: a count, and "no".
    """

    kind: str
    text: str
    answer: str
    time: float
    evidence: Span | None

    @property
    def age(self) -> float | None:
        """Seconds since the answer was last to be seen."""
        return None if self.evidence is None else self.time - self.evidence[1]


class Seen(NamedTuple):
    """A visit as some frames show it: places among them of the first and the last that do, and its number."""

    first: int
    last: int
    visit: int


class View:
    """Things that some frames of a world show. Questions about a view can be answered from its frames.

    Args:
        world: The world.
        frames: `[n]` whole seconds, increasing; the last one is now.

    Raises:
        ValueError: Not such seconds.
    """

    def __init__(self, world: World, frames: np.ndarray) -> None:
        frames = np.asarray(frames)
        whole = frames.ndim == 1 and len(frames) > 0 and np.issubdtype(frames.dtype, np.integer)
        if not whole or frames[0] < 0 or frames[-1] >= world.seconds or (np.diff(frames) <= 0).any():
            raise ValueError(f"frames: expected increasing whole seconds below {world.seconds}, got {frames!r}")
        self.world, self.frames = world, frames
        self.now = int(frames[-1])

    @property
    def last(self) -> int:
        """Place of the newest frame."""
        return len(self.frames) - 1

    @cached_property
    def cards(self) -> list[Seen]:
        """In order of first sight."""
        shown = self.world.card[self.frames]
        return sorted(_seen(shown[:, 0]) + _seen(shown[:, 1]), key=lambda seen: (seen.first, seen.visit))

    @cached_property
    def numbers(self) -> list[Seen]:
        """In order of first sight."""
        return sorted(_seen(self.world.number[self.frames]))

    @cached_property
    def gone(self) -> list[Seen]:
        """Cards that the newest frame does not show."""
        return [seen for seen in self.cards if seen.last < self.last]

    @cached_property
    def singles(self) -> list[Seen]:
        """Cards whose like was not seen a second time."""
        names = [self.card(seen).name for seen in self.cards]
        return [seen for seen, name in zip(self.cards, names, strict=True) if names.count(name) == 1]

    @property
    def here(self) -> list[tuple[int, Card]]:
        """Half and card of what the newest frame shows."""
        shown = self.world.card[self.now]
        return [(half, self.world.cards[shown[half]]) for half in (0, 1) if shown[half] >= 0]

    def card(self, seen: Seen) -> Card:
        return self.world.cards[seen.visit]

    def value(self, seen: Seen) -> str:
        shown: Number = self.world.numbers[seen.visit]
        return NUMBERS[shown.value]

    def place(self, index: int) -> int:
        """Return the place in `PLACES` of a frame."""
        return int(self.world.place[self.frames[index]])

    def box(self, index: int, card: Seen) -> str:
        """Return the box in which a frame shows a card."""
        second = int(self.frames[index])
        return str(self.world.box(second, int(np.flatnonzero(self.world.card[second] == card.visit)[0])))

    def seconds(self, seen: Seen) -> Span:
        """Return the seconds of the first and the last sight of a visit."""
        return float(self.frames[seen.first]), float(self.frames[seen.last])

    @property
    def moment(self) -> Span:
        """The newest frame as evidence."""
        return float(self.now), float(self.now)


def _seen(shown: np.ndarray) -> list[Seen]:
    """Find the visits in `[n]` numbers, -1 for none; each is one stretch of them."""
    visits, first = np.unique(shown, return_index=True)
    last = len(shown) - 1 - np.unique(shown[::-1], return_index=True)[1]
    return [Seen(int(a), int(b), int(v)) for v, a, b in zip(visits, first, last, strict=True) if v >= 0]


# text, answer, and the first and last second of the evidence
Found = tuple[str, str, Span | None]
Find = Callable[[View], Iterator[Found]]


def _now_colour(view: View) -> Iterator[Found]:
    for _, card in view.here:
        yield f"What colour is the {SHAPES[card.shape]} now?", COLOURS[card.colour], view.moment


def _now_shape(view: View) -> Iterator[Found]:
    for _, card in view.here:
        yield f"What is {COLOURS[card.colour]} now?", SHAPES[card.shape], view.moment


def _now_number(view: View) -> Iterator[Found]:
    number = view.world.number[view.now]
    if number >= 0:
        yield "What number is shown now?", NUMBERS[view.world.numbers[number].value], view.moment


def _now_place(view: View) -> Iterator[Found]:
    yield "Where are we now?", PLACES[view.place(view.last)], view.moment


def _now_box(view: View) -> Iterator[Found]:
    for half, card in view.here:
        yield f"What is the box of the {card.name} now?", str(view.world.box(view.now, half)), view.moment


def _past_colour(view: View) -> Iterator[Found]:
    shapes = [view.card(seen).shape for seen in view.cards]
    for seen in view.gone:
        card = view.card(seen)
        if shapes.count(card.shape) == 1:
            yield f"What colour was the {SHAPES[card.shape]}?", COLOURS[card.colour], view.seconds(seen)


def _past_shape(view: View) -> Iterator[Found]:
    colours = [view.card(seen).colour for seen in view.cards]
    for seen in view.gone:
        card = view.card(seen)
        if colours.count(card.colour) == 1:
            yield f"What was {COLOURS[card.colour]}?", SHAPES[card.shape], view.seconds(seen)


def _past_number(view: View) -> Iterator[Found]:
    if view.numbers and view.numbers[-1].last < view.last:
        yield "What number was shown last?", view.value(view.numbers[-1]), view.seconds(view.numbers[-1])


def _past_first_number(view: View) -> Iterator[Found]:
    if view.numbers and view.numbers[0].last < view.last:
        yield "What number was shown first?", view.value(view.numbers[0]), view.seconds(view.numbers[0])


def _past_place(view: View) -> Iterator[Found]:
    for seen in view.gone:
        if seen in view.singles and view.place(seen.first) == view.place(seen.last):
            yield f"Where were we with the {view.card(seen).name}?", PLACES[view.place(seen.first)], view.seconds(seen)


def _past_box(view: View) -> Iterator[Found]:
    for seen in view.gone:
        if seen in view.singles:
            text = f"What was the last box of the {view.card(seen).name}?"
            yield text, view.box(seen.last, seen), (float(view.frames[seen.last]),) * 2


def _past_when(view: View) -> Iterator[Found]:
    for seen in view.gone:
        if seen in view.singles:
            start = view.frames[seen.first]
            yield f"At which second did the {view.card(seen).name} come?", str(start), (float(start),) * 2


def _neighbours(view: View) -> Iterator[tuple[Seen, Seen]]:
    """Yield each card with the next to come, where nothing came together with either."""
    for i, (one, two) in enumerate(zip(view.cards, view.cards[1:], strict=False)):
        apart = one.first < two.first and (i == 0 or view.cards[i - 1].first < one.first)
        if apart and (i + 2 == len(view.cards) or two.first < view.cards[i + 2].first):
            yield one, two


def _past_after(view: View) -> Iterator[Found]:
    for one, two in _neighbours(view):
        if one in view.singles and two.last < view.last:
            yield f"What came after the {view.card(one).name}?", view.card(two).name, view.seconds(two)


def _past_before(view: View) -> Iterator[Found]:
    for one, two in _neighbours(view):
        if two in view.singles and one.last < view.last:
            yield f"What came before the {view.card(two).name}?", view.card(one).name, view.seconds(one)


def _past_count(view: View) -> Iterator[Found]:
    colours = [view.card(seen).colour for seen in view.cards]
    for colour, name in enumerate(COLOURS):
        if colours.count(colour) <= MOST:
            yield f"How many {name} cards were there?", str(colours.count(colour)), None


def _past_seen(view: View) -> Iterator[Found]:
    if not view.gone:
        return
    cards = [view.card(seen) for seen in view.cards]
    shown = {(card.colour, card.shape) for card in cards}
    for seen in view.gone:
        if seen in view.singles:
            yield f"Was there a {view.card(seen).name}?", "yes", view.seconds(seen)
    for colour, shape in np.ndindex(len(COLOURS), len(SHAPES)):
        if (colour, shape) not in shown:
            yield f"Was there a {COLOURS[colour]} {SHAPES[shape]}?", "no", None


_BOXES = tuple(str([c / 4, r / 4, (c + 1) / 4, (r + 1) / 4]) for r in range(3) for c in range(4))
_PAIRS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
# kind: how to find its questions, and the answers it can have; None for seconds, which depend on the world's length
KINDS: dict[str, tuple[Find, tuple[str, ...] | None]] = {
    "now_colour": (_now_colour, COLOURS),
    "now_shape": (_now_shape, SHAPES),
    "now_number": (_now_number, NUMBERS),
    "now_place": (_now_place, PLACES),
    "now_box": (_now_box, _BOXES),
    "past_colour": (_past_colour, COLOURS),
    "past_shape": (_past_shape, SHAPES),
    "past_number": (_past_number, NUMBERS),
    "past_first_number": (_past_first_number, NUMBERS),
    "past_place": (_past_place, PLACES),
    "past_box": (_past_box, _BOXES),
    "past_after": (_past_after, _PAIRS),
    "past_before": (_past_before, _PAIRS),
    "past_when": (_past_when, None),
    "past_count": (_past_count, tuple(str(count) for count in range(MOST + 1))),
    "past_seen": (_past_seen, ("yes", "no")),
}


def chance(kind: str, seconds: int) -> float:
    """Compute the share of right answers of one who draws from all that a kind can have as an answer.

    What stands beside a card in a question leaves out answers with its colour or its shape: 35 pairs are left.

    Args:
        kind: One of `KINDS`.
        seconds: Of the stream, for `"past_when"`.
    """
    answers = KINDS[kind][1]
    if answers is None:
        return 1 / seconds
    return 1 / (35 if answers is _PAIRS else len(answers))


def find(view: View, kind: str) -> list[Question]:
    """Find every question of a kind that a view has, in a fixed order.

    Raises:
        ValueError: An unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return [Question(kind, text, answer, float(view.now), span) for text, answer, span in KINDS[kind][0](view)]


def ask(view: View, rng: np.random.RandomState, kinds: Sequence[str] | None = None, count: int = 8) -> list[Question]:
    """Draw up to `count` different questions about a view.

    Kinds take turns in random order. Each question has a random answer of those that there are for its kind.
    """
    order = list(kinds or KINDS)
    found = {kind: find(view, kind) for kind in order}
    asked: list[Question] = []
    while len(asked) < count and any(found.values()):
        for kind in rng.permutation([kind for kind in order if found[kind]]).tolist()[: count - len(asked)]:
            answers = sorted({question.answer for question in found[kind]})
            answer = answers[rng.randint(len(answers))]
            fitting = [question for question in found[kind] if question.answer == answer]
            asked.append(fitting[rng.randint(len(fitting))])
            found[kind].remove(asked[-1])
    return asked


def ask_stream(
    world: World, rng: np.random.RandomState, kinds: Sequence[str] | None = None, count: int = 12
) -> list[Question]:
    """Draw up to `count` questions at moments of a whole stream, in order of time.

    Kinds take turns. Each question has an answer that is drawn from all that its kind can have, and a moment at which
    it is true, behind the first quarter of the stream; where twenty moments show none, it has another answer.
    """
    order = list(kinds or KINDS)
    asked: list[Question] = []
    turns = [kind for _ in range(0, count, len(order)) for kind in rng.permutation(order).tolist()]
    for kind in turns[:count]:
        answers = KINDS[kind][1]
        wanted = None if answers is None else answers[rng.randint(len(answers))]
        spare: list[Question] = []
        for _ in range(20):
            now = rng.randint(world.seconds // 4, world.seconds)
            here = [question for question in find(View(world, np.arange(now + 1)), kind) if question not in asked]
            fitting = here if wanted is None else [question for question in here if question.answer == wanted]
            spare += here
            if fitting:
                spare = fitting
                break
        if spare:
            asked.append(spare[rng.randint(len(spare))])
    return sorted(asked, key=lambda question: question.time)
