"""The bank of the VideoLLaMA3 port, which compares all pairs."""

from __future__ import annotations

from tests.golden_cases.vco_bank import assert_holds, new_bank
from tests.recordings import Case, implementations
from tests.tiers import lists
from vmemory.ops.bank import bank_push_


def check(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    if not case.holds("input") or "groups_after_each_step" not in facts:
        case.skip()
    for impl in implementations():
        frames, layout, state = new_bank(case, "all-pairs")
        for t, expected in enumerate(facts["groups_after_each_step"]):
            bank_push_(state, layout, frames[:, t : t + 1], impl=impl)
            assert lists(layout, state) == expected, (impl, t)
        for tier, group in enumerate(facts["final_groups"]):
            for frame in group:
                assert_holds(layout, state, tier, frame, tensors[f"group{tier}_frame{frame}"][0])
