"""TimeChat-Online's differential token drop."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.recordings import Case
from vmemory.compress import TokenDifference
from vmemory.testing import assert_within_budget


def check(case: Case) -> None:
    if case.holds("features", "keep", "score"):
        check_features(case)
    elif case.holds("frames_u8", "keep", "score"):
        check_pixels(case)
    else:
        case.skip()


def reducer_of(case: Case, by: Literal["feature", "pixel"]) -> TokenDifference:
    threshold = case.facts["threshold"]
    if not case.facts["absolute"]:
        return TokenDifference(by, drop=threshold)
    # a level of 255 counts 2
    return TokenDifference(by, threshold=1 - threshold if by == "feature" else 2 * 255 * threshold)


def assert_keeps(case: Case, kept: Tensor) -> None:
    """But for scores so close to the threshold that rounding decides; an absent score is far from it."""
    if not case.facts["absolute"]:
        assert case.facts["margins"]["smallest"] > 1e-6
        assert torch.equal(kept, case.tensors["keep"].bool())
        return
    clear = ~((case.tensors["score"] - case.facts["threshold"]).abs() < 1e-6)
    assert clear.any()
    assert torch.equal(kept[clear], case.tensors["keep"].bool()[clear])


def check_features(case: Case) -> None:
    features, score = case.tensors["features"], case.tensors["score"]
    reducer = reducer_of(case, "feature")
    ours = 1 - reducer.difference(features)[0, 1:].view_as(score[1:])
    low = cosine_similarity(features[1:], features[:-1], dim=-1)
    wide = cosine_similarity(features[1:].double(), features[:-1].double(), dim=-1)
    assert_within_budget(ours, low, wide)
    torch.testing.assert_close(score[1:].double(), wide, rtol=0, atol=1e-6)
    assert_keeps(case, reducer.mask(features))


def check_pixels(case: Case) -> None:
    """The second picture of a grid frame beside the first of the one before; the two between are never compared."""
    first, second = case.tensors["frames_u8"].unflatten(0, (-1, 2)).unbind(1)
    T, H, W = case.tensors["keep"].shape
    reducer = reducer_of(case, "pixel")
    tokens = torch.zeros(T, H, W, 1)
    kept = [reducer.mask(tokens[:1], pixels=second[:1])]
    for t in range(1, T):
        arguments = {"pixels": second[t : t + 1], "previous": first[t - 1]}
        kept.append(reducer.mask(tokens[t : t + 1], **arguments))
        score = reducer.difference(tokens[t : t + 1], **arguments).view(H, W) / (2 * 255)
        torch.testing.assert_close(score, case.tensors["score"][t], rtol=0, atol=1e-6)
    assert_keeps(case, torch.cat(kept))
