"""The tiered memory decides as the systems do that its rules come from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiers import Video, lists, pushed, video
from vmemory.ops.bank import bank_push_
from vmemory.reference.bank_layout import BankLayout, BankState


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("name", ["direct_top_3_3_3", "mid_4_3_8", "no_evict", "paper_2_2_12"])
def test_videochat_online_is_the_original(golden, name, impl, request):
    if impl == "native":
        request.getfixturevalue("native")
    about = json.loads((golden / f"vco_bank/{name}.json").read_text())
    stored = load_file(golden / f"vco_bank/{name}.safetensors")
    frames = stored["input"].permute(0, 2, 3, 1)[None].contiguous()
    grids = tuple((int(cells**0.5),) * 2 for cells in about["reduced_sizes"])
    intervals = () if about["direct"] else tuple(about["intervals"])
    dim, entries = frames.shape[-1], tuple(range(len(intervals)))
    layout = BankLayout((16, 16), dim, dim, tuple(about["capacities"]), grids, "videochat-online", intervals, entries)
    state = layout.new_state(1, "cpu", torch.float32)
    for t, expected in enumerate(about["groups_after_each_step"]):
        bank_push_(state, layout, frames[:, t : t + 1], impl=impl)
        assert lists(layout, state) == expected, t
    for tier, group in enumerate(about["final_groups"]):
        for frame in group:
            want = stored[f"group{tier}_tokens"][stored[f"group{tier}_indices"].tolist().index(frame)]
            check_golden(layout, state, tier, frame, want)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("name", ["cap_1_1_1_T5", "default_8_4_1_T60", "seed_test_3_2_1_T7"])
def test_all_pairs_is_the_port(golden, name, impl, request):
    if impl == "native":
        request.getfixturevalue("native")
    about = json.loads((golden / f"port_bank/{name}.json").read_text())
    stored = load_file(golden / f"port_bank/{name}.safetensors")
    frames = stored["input"].permute(0, 2, 3, 1)[None].contiguous()
    grids = tuple((int(cells**0.5),) * 2 for cells in about["reduced_sizes"])
    _, _, H, W, D = frames.shape
    layout = BankLayout((H, W), D, D, tuple(about["capacities"]), grids, "all-pairs")
    state = layout.new_state(1, "cpu", torch.float32)
    for t, expected in enumerate(about["groups_after_each_step"]):
        bank_push_(state, layout, frames[:, t : t + 1], impl=impl)
        assert lists(layout, state) == expected, t
    for tier, group in enumerate(about["final_groups"]):
        for frame in group:
            check_golden(layout, state, tier, frame, stored[f"group{tier}_frame{frame}"][0])


def check_golden(layout: BankLayout, state: BankState, tier: int, frame: int, want: Tensor) -> None:
    """A frame's tokens, channels first, as the original holds them, to the rounding of its few sums in float32."""
    slot = state.entry[0, :, 0].tolist().index(frame)
    row = layout.row_of(slot)
    got = state.slots[0, row : row + layout.cells[tier]].unflatten(0, layout.grids[tier]).permute(2, 0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize(
    ("key", "capacities", "steps", "kind"),
    [
        ("cascade_stops_after_one_level(long->mid, mid overflow dropped)", (2, 2, 4), 12, "drift"),
        ("all_zero_features(cos=0 everywhere)", (3, 2, 4), 6, "zero"),
        ("nan_in_frame_1(argmax treats NaN as max)", (3, 3, 3), 5, "nan"),
    ],
)
def test_quirks_of_the_original(golden, key, capacities, steps, kind, impl, request):
    if impl == "native":
        request.getfixturevalue("native")
    layout = BankLayout((4, 4), 8, 8, capacities, ((4, 4), (2, 2), (1, 1)), "videochat-online")
    frames = video(layout, 1, steps) * (kind != "zero")
    if kind == "nan":
        frames[:, 1] = float("nan")
    expected = json.loads((golden / "vco_bank/quirks.json").read_text())[key]
    assert lists(layout, pushed(layout, Video(frames), impl)) == expected
