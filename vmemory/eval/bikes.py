"""Six shots of a city in a memory, sentences and mirrored pictures, and the question which shot they are of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmemory.banks import Entries
from vmemory.data.bikes import CUTS, SENTENCES, fetch_bikes
from vmemory.encoders import FrameEncoder
from vmemory.eval.features import Features, video_features
from vmemory.eval.setups import Setup, keys_of, origin_of, setups, watch
from vmemory.search.encoder import Encoder
from vmemory.search.held import Memory
from vmemory.search.similar import centred_search
from vmemory.sources import FrameSource

# frames a second that memories watch
FPS = 5.0
BUDGETS = ("300KiB", "512KiB", "1MiB")


class ShotQueries(NamedTuple):
    """What is asked: `pooled [6, D]` of the shots' mirrored middle frames; `text [Q, E]` of sentences, which each come
    with the shots that show what they say."""

    pooled: Tensor
    text: Tensor
    sentences: Sequence[tuple[str, tuple[int, ...]]]


class ShotScore(NamedTuple):
    """How well a memory finds shots: pictures and sentences answered with a right shot; shots whose picture is `lost`;
    sentences answered `wrong`, with the second of the answer; bytes and entries held. An entry that merges shots is of
    none."""

    setup: Setup
    pictures: int
    sentences: int
    lost: tuple[int, ...]
    wrong: tuple[tuple[str, float], ...]
    nbytes: int
    held: int


def bikes(encoder: FrameEncoder) -> tuple[Features, ShotQueries]:
    """The clip at 5 frames a second, and what is asked about it.

    Raises:
        FetchError: The clip cannot be fetched.
    """
    path = fetch_bikes()
    features = video_features(path, encoder, FPS)
    frames = list(FrameSource(path, size=encoder.frame_size))
    middles = [(a + b) / 2 for a, b in pairwise(CUTS)]
    images = [min(frames, key=lambda frame: abs(frame.time - middle)).image[:, ::-1] for middle in middles]
    pictures = encoder.encode([np.ascontiguousarray(image) for image in images]).mean((1, 2))
    texts = torch.stack([encoder.text(sentence) for sentence, _ in SENTENCES])
    return features, ShotQueries(pictures, texts, SENTENCES)


def shots_of(entries: Entries) -> list[int]:
    """The shot of each entry, −1 where it spans several."""
    first, last = ([bisect_right(CUTS, t) - 1 for t in seconds.tolist()] for seconds in (entries.start, entries.stop))
    return [a if a == b else -1 for a, b in zip(first, last, strict=True)]


def evaluate(bank: Memory, setup: Setup, features: Features, queries: ShotQueries, encoder: Encoder) -> ShotScore:
    """Let a fresh memory watch the clip, calibrated on all of it, then ask everything."""
    origin = origin_of(features)
    watch(bank, features, origin)
    entries = bank.entries()
    keys = keys_of(bank, bank.read())
    pictures = centred_search(queries.pooled - origin, keys, 1)
    texts = centred_search(queries.text, encoder.joint(keys + origin), 1, centre_queries=False)
    shots = shots_of(entries)
    lost = [shot for shot, answer in enumerate(pictures.entry[:, 0].tolist()) if shots[answer] != shot]
    wrong = [
        (sentence, float(entries.time[answer]))
        for (sentence, right), answer in zip(queries.sentences, texts.entry[:, 0].tolist(), strict=True)
        if shots[answer] not in right
    ]
    return ShotScore(
        setup=setup,
        pictures=len(queries.pooled) - len(lost),
        sentences=len(queries.sentences) - len(wrong),
        lost=tuple(lost),
        wrong=tuple(wrong),
        nbytes=bank.nbytes,
        held=len(shots),
    )


def by_bytes(
    features: Features, queries: ShotQueries, encoder: Encoder, budgets: Sequence[str | int]
) -> tuple[ShotScore, list[list[ShotScore]]]:
    """A memory of all frames; and for each number of bytes every policy."""
    side, dim = features.tokens.shape[2:]
    everything = Setup("recent", keep=side).bank(side, dim, entries=len(features.time))
    unbounded = evaluate(everything, Setup("unbounded"), features, queries, encoder)
    return unbounded, [
        [evaluate(setup.bank(side, dim, budget=budget), setup, features, queries, encoder) for setup in setups(side)]
        for budget in budgets
    ]
