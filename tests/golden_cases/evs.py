"""Efficient video sampling, vLLM's: a budget for the whole video, spent on the tokens that changed most."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from tests.recordings import Case
from vmemory.compress import TokenDifference
from vmemory.testing import assert_within_budget


def check(case: Case) -> None:
    if not case.holds("features", "mask", "dissimilarity"):
        case.skip()
    features, mask = case.tensors["features"], case.tensors["mask"].bool()
    cells = mask[0].numel()
    share = 1 - case.facts["pruning_rate_q"]
    reducer = TokenDifference(budget=share if share > 0 else cells)
    assert reducer.count(len(mask), cells) == case.facts["retained_count"]
    ours = reducer.difference(features)[0, 1:].view_as(mask[1:])
    low = 1 - cosine_similarity(features[1:], features[:-1], dim=-1)
    assert_within_budget(ours, low, case.tensors["dissimilarity"][1:].double())
    kept = reducer.mask(features)
    if (tie := case.facts.get("tie")) is None:
        assert torch.equal(kept, mask)
        return
    # equal numbers meet at the cut, and rounding decides which of these the original keeps
    found = set(kept.flatten().nonzero().flatten().tolist())
    assert found >= set(tie["surely_kept"])
    assert len(found & set(tie["tied"])) == tie["taken_from_the_tied"]
    assert len(found) == case.facts["retained_count"]
