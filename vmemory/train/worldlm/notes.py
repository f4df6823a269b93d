"""Labels for the cells of frames, learned beside the answers.

An answer about what came after a card is found in few steps if the card's own tokens tell what came before it. Nothing
tells a model so but answers, a few words a clip. Readers of the layers between, which are thrown away, tell it so at
every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmemory.data.world import COLOURS, NUMBERS, SHAPES, View
from vmemory.data.world.questions import MOST
from vmemory.train.worldlm.clips import IGNORED, Asked, Rows
from vmemory.train.worldlm.labels import cell_of
from vmemory.train.worldlm.model import CELLS
from vmemory.train.worldlm.words import VIDEO, vocabulary


class Targets(NamedTuple):
    """Labels of the cells of clips, `[N]` each, `IGNORED` where there is none.

    Attributes:
        time: Words for the seconds of the frames.
        new: 1 where no earlier frame shows the card.
        came: Words for the seconds in which the cards came.
        colour, shape: Of the card that came before.
        recent, oldest: The last number shown up to here, and the first.
        like: How many cards of the same colour came before, at most `MOST`.
    """

    time: Tensor
    new: Tensor
    came: Tensor
    colour: Tensor
    shape: Tensor
    recent: Tensor
    oldest: Tensor
    like: Tensor


def targets_of(clips: Sequence[Asked]) -> Targets:
    """Find out what the cells of clips are to tell."""
    known = vocabulary()
    parts = []
    for clip in clips:
        seconds = clip.watched.seconds[clip.places]
        view = View(clip.watched.world, seconds)
        words = np.array([known[str(time)] for time in clip.times.tolist()])
        made = np.full((8, len(seconds), CELLS), IGNORED)
        made[0] = words[:, None]
        cards = view.cards
        first = np.array([card.first for card in cards])
        colours = [view.card(card).colour for card in cards]
        for number, card in enumerate(cards):
            at = np.arange(card.first, card.last + 1)
            half = int(np.flatnonzero(view.world.card[seconds[card.first]] == card.visit)[0])
            cell = cell_of(view.world.tile[seconds[at], half])
            made[1, at, cell] = at == card.first
            made[2, at, cell] = words[card.first]
            made[7, at, cell] = min(MOST, colours[:number].count(colours[number]))
            # of cards that come together none is the one before
            before = np.flatnonzero(first < card.first)
            if len(before) and (first == first[before[-1]]).sum() == 1:
                last = view.card(cards[before[-1]])
                made[3, at, cell], made[4, at, cell] = last.colour, last.shape
        shown = view.world.number[seconds]
        visits = np.maximum.accumulate(shown)
        values = np.array([number.value for number in view.world.numbers] + [IGNORED])
        made[5, :, -1] = values[visits]
        if visits[-1] >= 0:
            made[6, :, -1] = np.where(visits >= 0, values[shown[shown >= 0][0]], IGNORED)
        parts.append(made.reshape(8, -1))
    return Targets(*torch.from_numpy(np.concatenate(parts, 1)))


class Notes(nn.Module):
    """Readers of hidden states behind the first, second and third layer.

    Args:
        dim: Channels of the language model.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time, self.came = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.new = nn.Linear(dim, 2)
        self.before = nn.ModuleList(nn.Linear(dim, len(COLOURS) + len(SHAPES)) for _ in range(2))
        self.numbers = nn.ModuleList(nn.Linear(dim, len(NUMBERS)) for _ in range(2))
        self.like = nn.Linear(dim, MOST + 1)
        self.asked = nn.Linear(dim, len(COLOURS) + len(SHAPES) + 2)

    def forward(self, states: Sequence[Tensor], rows: Rows, wanted: Targets, table: Tensor) -> dict[str, Tensor]:
        """Return the loss of each reader.

        Args:
            states: Hidden states `[B, L, dim]` before the first layer and behind each.
            rows, wanted: Of the same clips.
            table: Vectors of the words `[V, dim]`.
        """
        cells = rows.ids == vocabulary()[VIDEO]
        one, two, three = (states[i][cells] for i in (1, 2, 3))
        new = wanted.new == 1
        out = {"time": _loss(self.time(one[::CELLS]) @ table.T, wanted.time[::CELLS])}
        out["new"] = _loss(self.new(one), wanted.new)
        there = wanted.came != IGNORED
        out["came"] = _loss(self.came(two[there]) @ table.T, wanted.came[there])
        for name, state, where, reader in zip(
            ("before", "before_all"), (two, three), (new, there), self.before, strict=True
        ):
            colour, shape = reader(state[where]).split([len(COLOURS), len(SHAPES)], 1)
            out[name] = _loss(colour, wanted.colour[where]) + _loss(shape, wanted.shape[where])
        for name, wants, reader in zip(("recent", "oldest"), (wanted.recent, wanted.oldest), self.numbers, strict=True):
            out[name] = _loss(reader(two[CELLS - 1 :: CELLS]), wants[CELLS - 1 :: CELLS])
        out["like"] = _loss(self.like(three[there]), wanted.like[there])
        out["asked"] = self._asked(states[1], rows)
        return out

    def _asked(self, state: Tensor, rows: Rows) -> Tensor:
        """Return the loss of reading at a question's last word which colour and shape it speaks of."""
        known = vocabulary()
        answers = rows.labels != IGNORED
        last = torch.zeros_like(answers)
        last[:, :-1] = answers[:, 1:] & ~answers[:, :-1]
        named = []
        row, at = last.nonzero(as_tuple=True)
        number = rows.part[row, at]
        own = (rows.part[row] == number[:, None]) & ~answers[row]
        for words in (COLOURS, SHAPES):
            base = known[words[0]]
            ids = rows.ids[row] - base
            fitting = own & (ids >= 0) & (ids < len(words))
            named.append(torch.where(fitting.any(1), (ids * fitting).sum(1), len(words)))
        colour, shape = self.asked(state[row, at]).split([len(COLOURS) + 1, len(SHAPES) + 1], 1)
        return F.cross_entropy(colour, named[0]) + F.cross_entropy(shape, named[1])


def _loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean loss of what there is to tell, 0 of nothing."""
    return F.cross_entropy(scores, wanted, reduction="sum") / (wanted != IGNORED).sum().clamp(min=1)
