"""ToMe: which tokens merge, and into what. Recorded margins are larger than a rounding: no tie is left to chance."""

from __future__ import annotations

import torch

from tests.recordings import Case
from vmemory.ops import bipartite_match, token_merge, token_unmerge
from vmemory.testing import assert_within_budget


def check(case: Case) -> None:
    if not case.holds("metric", "source", "x", "size", "y", "y_unit", "x_mean"):
        case.skip()
    facts, run = case.facts, case.tensors
    x, size = run["x"], run["size"]
    for impl in ("auto", "reference"):
        plan = bipartite_match(run["metric"], facts["r"], facts["class_token"] + facts["distill_token"], impl=impl)
        held = torch.zeros_like(run["source"]).scatter_(1, plan.place[:, None], 1.0)
        assert torch.equal(held, run["source"])
        for weights, y, size_out in ((size, "y", "size_out"), (None, "y_unit", "size_out_unit")):
            actual = token_merge(x, plan, weights, impl=impl)
            wide = token_merge(x.double(), plan, None if weights is None else size.double(), impl="reference")
            assert_within_budget(actual.x, run[y], wide.x)
            assert torch.equal(actual.size, run[size_out])
        mean, wide_mean = token_merge(x, plan, impl=impl), token_merge(x.double(), plan, impl="reference")
        assert_within_budget(mean.x, run["x_mean"], wide_mean.x)
        if "unmerged" not in run:
            continue
        back = token_unmerge(run["y"], plan, impl=impl)
        if not facts["distill_token"]:
            assert torch.equal(back, run["unmerged"])
            continue
        # with a distillation token ToMe writes [A0, B0, unmerged A, B], but reads [unmerged A, B] back
        unmerged = (x.shape[1] + 1) // 2 - facts["r"]
        assert torch.equal(run["unmerged"][:, 1::2], run["y"][:, unmerged:])
        assert torch.equal(back[:, :2], run["y"][:, :2])
        assert_within_budget(back, (held.mT @ run["y"]), (held.mT.double() @ run["y"].double()))
