"""VideoChat-Online: its memory, its pooling, the order of its tokens, and what it does where papers say nothing."""

from __future__ import annotations

import ast
import re
from typing import Any

import torch
from torch import Tensor

from tests.recordings import Case, implementations
from tests.tiers import Video, lists, pushed, video
from vmemory.compress import tokens_arrange
from vmemory.ops import grid_pool
from vmemory.ops.bank import bank_push_
from vmemory.reference.bank_layout import BankLayout, BankState


def check(case: Case) -> None:
    if case.holds("input"):
        check_memory(case)
    elif case.holds("x", "y"):
        check_pooling(case)
    else:
        check_quirks(case)


def new_bank(case: Case, rule: str, *arguments: Any) -> tuple[Tensor, BankLayout, BankState]:
    """The recorded frames [1, T, H, W, C], and an empty memory for them."""
    frames = case.tensors["input"].permute(0, 2, 3, 1)[None].contiguous()
    _, _, H, W, C = frames.shape
    grids = tuple((round(cells**0.5),) * 2 for cells in case.facts["reduced_sizes"])
    layout = BankLayout((H, W), C, C, tuple(case.facts["capacities"]), grids, rule, *arguments)
    return frames, layout, layout.new_state(1, "cpu", torch.float32)


def assert_holds(layout: BankLayout, state: BankState, tier: int, frame: int, want: Tensor) -> None:
    """A frame's tokens, channels first, as the original holds them, to the rounding of its few sums in float32."""
    slot = state.entry[0, :, 0].tolist().index(frame)
    row = layout.row_of(slot)
    got = state.slots[0, row : row + layout.cells[tier]].unflatten(0, layout.grids[tier]).permute(2, 0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def check_memory(case: Case) -> None:
    facts, tensors = case.facts, case.tensors
    intervals = () if facts["direct"] else tuple(facts["intervals"])
    for impl in implementations():
        frames, layout, state = new_bank(case, "videochat-online", intervals, tuple(range(len(intervals))))
        for t, expected in enumerate(facts["groups_after_each_step"]):
            bank_push_(state, layout, frames[:, t : t + 1], impl=impl)
            assert lists(layout, state) == expected, (impl, t)
        for tier, group in enumerate(facts["final_groups"]):
            for frame in group:
                place = tensors[f"group{tier}_indices"].tolist().index(frame)
                assert_holds(layout, state, tier, frame, tensors[f"group{tier}_tokens"][place])


def check_pooling(case: Case) -> None:
    x, y = case.tensors["x"], case.tensors["y"]
    mode = f"pixel_shuffle_{case.path.name.rpartition('_')[2]}"
    for impl in implementations():
        assert torch.equal(grid_pool(x, tuple(y.shape[1:3]), mode, impl=impl), y)


# capacities, frames and their kind, which the recording does not hold
QUIRKS = {
    "cascade_stops_after_one_level(long->mid, mid overflow dropped)": ((2, 2, 4), 12, "drift"),
    "all_zero_features(cos=0 everywhere)": ((3, 2, 4), 6, "zero"),
    "nan_in_frame_1(argmax treats NaN as max)": ((3, 3, 3), 5, "nan"),
}
ARRANGED = re.compile(r"tokens_arrange\((.*?)\)(?: \(.*\))?")


def check_quirks(case: Case) -> None:
    known = 0
    for key, expected in case.facts.items():
        if key in QUIRKS:
            capacities, steps, kind = QUIRKS[key]
            layout = BankLayout((4, 4), 8, 8, capacities, ((4, 4), (2, 2), (1, 1)), "videochat-online")
            frames = video(layout, 1, steps) * (kind != "zero")
            if kind == "nan":
                frames[:, 1] = float("nan")
            for impl in implementations():
                assert lists(layout, pushed(layout, Video(frames), impl)) == expected, (impl, key)
        elif call := ARRANGED.fullmatch(key):
            assert tokens_arrange(*ast.literal_eval(call[1])) == expected, key
        else:
            continue
        known += 1
    if not known:
        case.skip()
