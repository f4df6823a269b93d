from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiers import Video, lists, pushed, video
from vmemory.ops import bank as ops
from vmemory.ops.bank import BankTokens, bank_decide, bank_gather, bank_plan, bank_push_, layout_maps
from vmemory.reference.bank_layout import RULES, BankLayout, BankState
from vmemory.testing import assert_within_budget, layouts, random_tensor

WHOLE = ("entry", "order", "counter")
HALVES = ((6, 4), (3, 2), (1, 1))
# five capacities of 1, odd sizes, a first tier smaller than the frames, frames that enter below or nowhere
CASES = {
    "paper": BankLayout((6, 4), 17, 17, (3, 2, 4), HALVES),
    "paper-one": BankLayout((4, 4), 16, 16, (1, 1, 1), ((4, 4), (2, 2), (1, 1))),
    "paper-enters": BankLayout((5, 7), 16, 9, (2, 3, 3), ((4, 5), (2, 2), (1, 2)), "paper", (4, 2, 3), (0, 1, 2)),
    "paper-late": BankLayout((4, 4), 8, 8, (3, 2), ((4, 4), (2, 2)), "paper", (3, 2), (-1, 1)),
    "videochat-online": BankLayout((8, 8), 16, 16, (2, 2, 5), ((8, 8), (4, 4), (2, 2)), "videochat-online"),
    "all-pairs": BankLayout((6, 6), 16, 16, (4, 3, 1), ((6, 6), (4, 4), (3, 3)), "all-pairs"),
    "merge": BankLayout((4, 3), 20, 20, (4,), ((4, 3),), "merge"),
    "merge-one": BankLayout((4, 3), 20, 20, (1,), ((2, 3),), "merge"),
    "uniform": BankLayout((4, 3), 16, 16, (5,), ((4, 3),), "uniform"),
    "recent": BankLayout((4, 4), 16, 16, (2, 3), ((4, 4), (2, 2)), "recent"),
    "none": BankLayout((4, 4), 16, 16, (), (), "paper"),
}


def links(layout: BankLayout, state: BankState | ops.BankPlan) -> Tensor:
    """The cosines that mean something: the first place of a list has no neighbour before it."""
    link = state.link.clone()
    if RULES[layout.rule].choose != "all":
        link[:, list(layout.first_link)] = 0
    return link


def check_state(layout: BankLayout, v: Video, actual: BankState, **kwargs) -> bool:
    """Decisions equal the reference's, numbers are within the budget; False where its margins are within rounding."""
    low = pushed(layout, v, "reference", **kwargs)
    wide = pushed(layout, v._replace(frames=v.frames.double()), "reference", **kwargs)
    if v.frames.dtype == torch.float64:
        low = pushed(layout, v._replace(frames=v.frames.float()), "reference", **kwargs)
        low = BankState(*(t.to(a.dtype) for t, a in zip(low, actual, strict=True)))
    if not all(torch.equal(getattr(low, name), getattr(wide, name)) for name in WHOLE):
        return False
    for name in WHOLE:
        assert torch.equal(getattr(actual, name), getattr(low, name)), name
    assert_within_budget(actual.clock, low.clock, wide.clock, "clock")
    for name in ("slots", "mass", "descriptor", "norm"):
        got = [getattr(state, name) for state in (actual, low, wide)]
        if name in ("descriptor", "norm"):
            # sums of many terms that may cancel: one rounding is one of the largest term
            largest = v.frames.nan_to_num(0.0).abs().amax().nan_to_num() if v.frames.numel() else torch.zeros(())
            got = [torch.cat([x.flatten(), largest.to(x.dtype).reshape(1)]) for x in got]
        assert_within_budget(*got, name)
    return True


def check_plan(layout: BankLayout, v: Video, state: BankState, impl: str) -> ops.BankPlan:
    """Planning decides as streaming did, bit for bit."""
    plan = bank_plan(v.frames, layout, time=v.time, mask=v.mask, impl=impl)
    for name in (*WHOLE, "clock", "descriptor", "norm"):
        assert torch.equal(getattr(plan, name).nan_to_num(7.0), getattr(state, name).nan_to_num(7.0)), name
    assert torch.equal(links(layout, plan).nan_to_num(7.0), links(layout, state).nan_to_num(7.0))
    for s in range(v.frames.shape[0]):
        for slot, (_, first, last, merged) in enumerate(plan.entry[s].tolist()):
            held = (plan.assign[s] == slot).nonzero().flatten().tolist()
            assert len(held) == max(merged, 0)
            assert not held or (held[0], held[-1]) == (first, last)
    return plan


def check_tokens(layout: BankLayout, v: Video, plan: ops.BankPlan, impl: str) -> None:
    actual = bank_gather(v.frames, plan, layout, mask=v.mask, impl=impl)
    low = bank_gather(v.frames, plan, layout, mask=v.mask, impl="reference")
    wide = bank_gather(v.frames.double(), plan, layout, mask=v.mask, impl="reference")
    if v.frames.dtype == torch.float64:
        low = bank_gather(v.frames.float(), plan, layout, mask=v.mask, impl="reference")
        low = BankTokens(low.slots.double(), low.mass)
    assert_within_budget(tuple(actual), tuple(low), tuple(wide), "gather")


@st.composite
def problems(draw) -> tuple[BankLayout, Video, int]:
    rule = draw(st.sampled_from(sorted(RULES)))
    tiers = 1 if rule == "merge" else draw(st.integers(1, 3))
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    sides = [grid]
    for _ in range(tiers):
        smaller = tuple(draw(st.integers(max(1, side // 3), side)) for side in sides[-1])
        sides.append(smaller)
    grids = tuple(sides[1:]) if draw(st.booleans()) else tuple(sides[:-1])
    capacities = tuple(draw(st.integers(1, 5)) for _ in range(tiers))
    levels = draw(st.integers(0, tiers)) if tiers > 1 else 0
    intervals = tuple(draw(st.integers(1, 4)) for _ in range(levels))
    entries = tuple(draw(st.integers(-1, tiers - 1)) for _ in range(levels))
    dim = draw(st.integers(1, 40))
    layout = BankLayout(grid, dim, draw(st.integers(1, dim)), capacities, grids, rule, intervals, entries)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    streams, steps, seed = draw(st.integers(1, 2)), draw(st.integers(0, 9)), draw(st.integers(0, 99))
    frames = video(layout, streams, steps, dtype, seed)
    if steps > 2 and draw(st.booleans()):
        frames[:, 1] = frames[:, 0]
    if steps > 2 and draw(st.integers(0, 3)) == 0:
        frames[:, 2] = float("nan")
    time = random_tensor(streams, steps, dtype=torch.float64).abs().cumsum(1) if draw(st.booleans()) else None
    mask = random_tensor(streams, steps, *grid, seed=seed) > -0.5 if draw(st.booleans()) else None
    return layout, Video(frames, time, mask), draw(st.sampled_from([1, 3, 100]))


@pytest.mark.usefixtures("native")
@given(problems())
@settings(max_examples=40, deadline=None)
def test_native_matches_reference(problem):
    layout, v, chunk = problem
    state = pushed(layout, v, "native", chunk)
    assume(check_state(layout, v, state))
    plan = check_plan(layout, v, state, "native")
    check_tokens(layout, v, plan, "native")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    layout = CASES[name]
    v = Video(video(layout, 1, 16))
    state = pushed(layout, v, "native", 5)
    assert check_state(layout, v, state)
    check_tokens(layout, v, check_plan(layout, v, state, "native"), "native")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_gather_equals_streaming_to_rounding(impl):
    layout = CASES["videochat-online"]
    v = Video(video(layout, 1, 12, torch.bfloat16))
    plan = bank_plan(v.frames, layout, impl=impl)
    low, wide = pushed(layout, v, "reference"), pushed(layout, v._replace(frames=v.frames.double()), "reference")
    assert torch.equal(low.entry, wide.entry)
    assert_within_budget(bank_gather(v.frames, plan, layout, impl=impl)[:1], low[:1], wide[:1])


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("streams", [[-1, 2, 0], [-1, -1, -1], [2, 1, 0]])
def test_streams_are_addressed(impl, streams, request):
    if impl == "native":
        request.getfixturevalue("native")
    layout = CASES["paper"]
    v = Video(video(layout, 3, 9))
    alone = pushed(layout, v, impl)
    state = pushed(layout, v, impl, streams=torch.tensor(streams))
    untouched = layout.new_state(3, "cpu", torch.float32)
    for s in range(3):
        row = streams.index(s) if s in streams else None
        for got, want, empty in zip(state, alone, untouched, strict=True):
            assert torch.equal(got[s].nan_to_num(7.0), (empty[s] if row is None else want[row]).nan_to_num(7.0))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("arrangement", ["offset", "strided", "reversed", "padded"])
def test_any_arrangement_gives_the_same_bits(arrangement):
    layout = CASES["paper-enters"]
    time = torch.arange(9, dtype=torch.float64).expand(2, 9) * 0.5
    mask = random_tensor(2, 9, *layout.grid) > -1
    v = Video(video(layout, 2, 9), time, mask)
    other = Video(*(layouts(x)[arrangement] for x in v))
    for a, b in zip(pushed(layout, v, "native", 2), pushed(layout, other, "native", 2), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    a, b = (bank_plan(x.frames, layout, time=x.time, mask=x.mask, impl="native") for x in (v, other))
    assert torch.equal(a.assign, b.assign)
    tokens = [bank_gather(x.frames, a, layout, mask=x.mask, impl="native") for x in (v, other)]
    assert torch.equal(tokens[0].slots, tokens[1].slots)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rule", ["paper", "all-pairs", "merge"])
def test_nan_frames_leave_first(rule):
    tiers = 1 if rule == "merge" else 3
    layout = BankLayout((4, 4), 8, 8, (4, 3, 2)[:tiers], ((4, 4), (2, 2), (1, 1))[:tiers], rule)
    frames = video(layout, 1, 30)
    frames[:, 5], frames[:, 6], frames[:, 11] = float("nan"), float("inf"), float("nan")
    state = pushed(layout, Video(frames), "native")
    assert all({5, 6, 11}.isdisjoint(tier) for tier in lists(layout, state))
    assert torch.isfinite(state.slots).all()


@pytest.mark.usefixtures("native")
def test_identical_frames_leave_in_order():
    layout = BankLayout((4, 4), 33, 33, (4, 4), ((4, 4), (2, 2)))
    frames = video(layout, 1, 1).expand(-1, 30, -1, -1, -1).contiguous()
    state = pushed(layout, Video(frames), "native")
    assert lists(layout, state) == [[26, 27, 28, 29], [22, 23, 24, 25]]
    assert len({state.link[0, place].item() for place in (1, 2, 3, 5, 6, 7)}) == 1


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["paper-enters", "merge", "videochat-online"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(name, masked):
    layout = replace(CASES[name], dim=2, key_dim=2)
    frames = video(layout, 1, 7, torch.float64)
    mask = random_tensor(1, 7, *layout.grid) > -0.5 if masked else None
    plan = bank_plan(frames, layout, mask=mask)
    # the smallest tier comes from the plan, whose frames are not differentiated: forward and backward both know that
    check = torch.autograd.gradcheck(
        lambda x: bank_gather(x, bank_plan(x, layout, mask=mask), layout, mask=mask).slots,
        frames.requires_grad_(),
        fast_mode=True,
    )
    assert check
    assert torch.equal(plan.assign, bank_plan(frames, layout, mask=mask).assign)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_reference(dtype):
    layout = CASES["paper-enters"]
    v = video(layout, 2, 12, dtype)
    plan = bank_plan(v, layout)
    grads = []
    for impl, kind in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
        x = v.to(kind).requires_grad_()
        slots = bank_gather(x, plan, layout, impl=impl).slots
        grads += torch.autograd.grad(slots, x, random_tensor(*slots.shape, dtype=dtype).to(kind))
    assert_within_budget(*grads)


@pytest.mark.usefixtures("native")
def test_opcheck():
    layout = CASES["paper"]
    frames, maps = video(layout, 2, 4), layout_maps(layout, torch.zeros(()))
    state = layout.new_state(2, "cpu", torch.float32)
    time = torch.arange(8, dtype=torch.float64).reshape(2, 4)
    arguments = (*state, frames, time, None, None, None, maps, *layout.kernel_args)
    torch.library.opcheck(torch.ops.vmemory.bank_push_.default, arguments)
    lists = (state.norm, state.link, state.entry, state.order, state.counter, None, None)
    torch.library.opcheck(torch.ops.vmemory.bank_decide.default, (*lists, *layout.kernel_args))
    sizes = layout.descriptors, layout.key_dim, layout.pooled_cells
    arguments = (frames, time, None, maps, *layout.kernel_args, *sizes)
    torch.library.opcheck(torch.ops.vmemory.bank_plan.default, arguments)
    plan = ops.BankPlan(*torch.ops.vmemory.bank_plan(*arguments))
    arguments = (frames, None, plan.pooled, plan.assign, plan.entry, maps, *layout.kernel_args)
    torch.library.opcheck(torch.ops.vmemory.bank_gather.default, arguments)
    slots, mass = torch.ops.vmemory.bank_gather(*arguments)
    arguments = (slots, mass, None, plan.assign, maps, list(layout.grid), *layout.kernel_args)
    torch.library.opcheck(torch.ops.vmemory.bank_gather_backward.default, arguments)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    layout = CASES["paper"]
    maps = layout_maps(layout, torch.zeros(()))

    def step(state: BankState, frames: Tensor) -> tuple[Tensor, Tensor]:
        victim = bank_decide(state, layout).leaves[:, None].expand(-1, frames.shape[1], -1)
        bank_push_(state, layout, frames, maps=maps, victim=victim)
        plan = bank_plan(frames, layout, maps=maps)
        return bank_gather(frames, plan, layout, maps=maps).slots * 2, state.counter + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    eager_state, state = (layout.new_state(1, "cpu", torch.float32) for _ in range(2))
    for start in range(0, 16, 4):
        frames = video(layout, 1, 16)[:, start : start + 4]
        for a, b in zip(compiled(state, frames), step(eager_state, frames), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(state, eager_state, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": torch.zeros(1, 2, 4, 4, 17)}, r"frames: expected \[S, T, 6, 4, 17\]"),
        ({"frames": torch.zeros(6, 4, 17)}, r"frames: expected a tensor \[S, T, H, W, D\]"),
        ({"frames": torch.zeros(1, 2, 6, 4, 17, dtype=torch.int32)}, "frames: .*int32"),
        (
            {"frames": torch.zeros(1, 2, 6, 4, 17, dtype=torch.float16)},
            "frames: expected the bank's dtype torch.float32, got torch.float16",
        ),
        ({"frames": torch.zeros(2, 2, 6, 4, 17)}, "frames: expected 1 streams, got 2"),
        ({"time": torch.zeros(1, 2)}, r"time: expected torch.float64 of shape \[1, 2\]"),
        ({"mask": torch.zeros(1, 2, 4, 6, dtype=torch.bool)}, r"mask: expected torch.bool of shape \[1, 2, 6, 4\]"),
    ],
)
def test_bad_arguments(change, words):
    layout = CASES["paper"]
    state = layout.new_state(1, "cpu", torch.float32)
    before = [t.clone() for t in state]
    arguments = {"frames": torch.zeros(1, 2, 6, 4, 17)} | change
    with pytest.raises(ValueError, match=words):
        bank_push_(state, layout, **arguments)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(state, before, strict=True))
