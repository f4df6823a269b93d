"""Clips of worlds with questions, as rows of words that the language model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vmemory.data.world import Question, View, World, ask
from vmemory.train.worldlm.eyes import encoded
from vmemory.train.worldlm.model import CELLS
from vmemory.train.worldlm.words import END, PAD, SECONDS, VIDEO, vocabulary, word_ids

IGNORED = -100


class Watched(NamedTuple):
    """A world's frames as the tower sees them: seconds `[n]` and features `[n, 4, C]` in half precision."""

    world: World
    seconds: np.ndarray
    features: Tensor


class Asked(NamedTuple):
    """A clip with questions: places of its frames in a `Watched`, the words for their seconds, and the questions."""

    watched: Watched
    places: np.ndarray
    times: np.ndarray
    questions: list[Question]


class Rows(NamedTuple):
    """Prompts with all their questions, padded behind.

    Attributes:
        ids: `[B, L]` words.
        labels: `[B, L]`, the words of answers and `IGNORED`.
        part: `[B, L]`, 0 in frames, 1, 2, … in the questions, -1 in what is padded.
        place: `[B, L]`, each question follows the frames.
        features: `[N, C]` of all cells.
    """

    ids: Tensor
    labels: Tensor
    part: Tensor
    place: Tensor
    features: Tensor


@torch.no_grad()
def watch(tower: Any, seeds: Sequence[int], frames: int, split: str = "train") -> list[Watched]:
    """Encode `frames` seconds of each of several worlds, in a row or with gaps."""
    out = []
    for seed in seeds:
        rng = np.random.RandomState([seed, 1])
        world = World(seed, int(rng.randint(max(80, frames + 10), 601)), split=split)
        if rng.rand() < 0.5:
            start = rng.randint(world.seconds - frames + 1)
            seconds = np.arange(start, start + frames)
        else:
            seconds = np.sort(rng.permutation(world.seconds)[:frames])
        out.append(Watched(world, seconds, seen(tower, world, seconds)))
    return out


@torch.no_grad()
def seen(tower: Any, world: World, seconds: np.ndarray) -> Tensor:
    """Encode some seconds of a world, `[n, 4, C]` in half precision."""
    parts = [
        encoded(tower, torch.from_numpy(world.render(seconds[i : i + 128])))[0] for i in range(0, len(seconds), 128)
    ]
    return torch.cat(parts).half()


def draw_clip(
    watched: Watched, rng: np.random.RandomState, least: int, most: int, kinds: Sequence[str], count: int
) -> Asked:
    """Take some frames of a world, in a row or with gaps, give them other seconds, and ask about them."""
    total = len(watched.seconds)
    length = int(rng.randint(min(least, total), min(most, total) + 1))
    if rng.rand() < 0.5:
        start = rng.randint(total - length + 1)
        places = np.arange(start, start + length)
    else:
        places = np.sort(rng.permutation(total)[:length])
    seconds = watched.seconds[places]
    # every second that has a word is met, and often those of a stream that has just begun
    shift = int(-seconds[0] if rng.rand() < 0.5 else rng.randint(-seconds[0], SECONDS - seconds[-1]))
    questions = ask(View(watched.world, seconds), rng, kinds or None, count)
    moved = [q._replace(answer=str(int(q.answer) + shift)) if q.kind == "past_when" else q for q in questions]
    return Asked(watched, places, seconds + shift, moved)


def rows_of(clips: Sequence[Asked]) -> Rows:
    """Write a row for each clip: a word and four cells for each frame, then its questions and answers."""
    known = vocabulary()
    rows: list[list[Tensor]] = []
    for clip in clips:
        words = [word for time in clip.times.tolist() for word in (known[str(time)], *[known[VIDEO]] * CELLS)]
        frames = len(words)
        learned, number_of, at = [IGNORED] * frames, [0] * frames, list(range(frames))
        for number, question in enumerate(clip.questions, 1):
            text, answer = word_ids(question.text), [*word_ids(question.answer), known[END]]
            words += text + answer
            learned += [IGNORED] * len(text) + answer
            number_of += [number] * len(text + answer)
            at += range(frames, frames + len(text + answer))
        rows.append([torch.tensor(values) for values in (words, learned, number_of, at)])
    ids, labels, part, place = (
        nn.utils.rnn.pad_sequence(list(values), True, empty)
        for values, empty in zip(zip(*rows, strict=True), (known[PAD], IGNORED, -1, 0), strict=True)
    )
    features = torch.cat([clip.watched.features[clip.places].float().flatten(0, 1) for clip in clips])
    return Rows(ids, labels, part, place, features)


def sight(part: Tensor) -> Tensor:
    """Tell what each word of rows attends to, bool `[B, 1, L, L]`: the frames, and its own question, up to itself."""
    length = part.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    fitting = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    return (earlier & fitting)[:, None]
