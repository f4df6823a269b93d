"""A walk as 20 photos in a memory, and 5 more, taken in between, that are looked for.

Time is a photo's place in the walk. A photo is found where the answer lies within two places of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vmemory.data import fetch_walk
from vmemory.eval.features import Features
from vmemory.eval.setups import Setup, setups
from vmemory.eval.trailer import Queries, Score, evaluate
from vmemory.search.encoder import Encoder

# places: how far off an answer may be, and the longest merged span that counts as an answer at all
TOLERANCE = 2.0
LONGEST_SPAN = 4.0
BUDGETS = ("300KiB", "512KiB", "1MiB")


def walk(encoder: Encoder, cache_dir: str | Path | None = None) -> tuple[Features, Queries, list[str]]:
    """The photos shown as features, those held out as queries, and the names of the latter; 25 photos are encoded.

    Raises:
        FetchError: The photos cannot be fetched.
    """
    shown, held_out = fetch_walk(cache_dir)
    tokens = encoder.encode([_read(path) for path in shown.values()]).half()
    asked = encoder.encode([_read(path) for path in held_out.values()])
    places, truth = (torch.tensor(list(photos), dtype=torch.float64) for photos in (shown, held_out))
    queries = Queries(asked.mean((1, 2)), truth, TOLERANCE, LONGEST_SPAN)
    return Features(tokens, places, None), queries, [path.name for path in held_out.values()]


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as opened:
        return np.array(opened.convert("RGB"))


def by_bytes(features: Features, queries: Queries, budgets: Sequence[str | int]) -> tuple[Score, list[list[Score]]]:
    """A memory of all photos; and for each number of bytes every policy, calibrated on the whole walk."""
    side, dim = features.tokens.shape[2:]
    everything = Setup("recent", keep=side).bank(side, dim, entries=len(features.time))
    unbounded = evaluate(everything, Setup("unbounded"), features, queries)
    return unbounded, [
        [evaluate(setup.bank(side, dim, budget=budget), setup, features, queries) for setup in setups(side)]
        for budget in budgets
    ]
