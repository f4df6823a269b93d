"""The tiered memory's kernels for CUDA devices: Triton on the CPU and compiled ahead of time, both kinds on one."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vmemory.ops.bank import BankPlan, bank_decide, bank_gather, bank_plan, bank_push_, layout_maps
from vmemory.reference.bank_layout import RULES, BankLayout, BankState
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, poisoned, random_tensor

MODULE = "vmemory.kernels.bank"
CASES = {
    "paper": BankLayout((4, 2), 9, 9, (2, 1, 2), ((4, 2), (2, 2), (1, 1))),
    "paper-enters": BankLayout((3, 4), 6, 5, (1, 2, 2), ((3, 3), (2, 2), (1, 2)), "paper", (4, 2, 3), (0, 1, 2)),
    "videochat-online": BankLayout((4, 2), 6, 6, (2, 2, 2), ((4, 2), (2, 1), (1, 1)), "videochat-online"),
    "all-pairs": BankLayout((3, 3), 6, 6, (3, 2), ((3, 3), (2, 2)), "all-pairs"),
    "merge": BankLayout((2, 3), 6, 6, (3,), ((2, 3),), "merge"),
    "uniform": BankLayout((2, 3), 6, 6, (3,), ((2, 3),), "uniform"),
    "recent": BankLayout((2, 4), 6, 6, (1, 2), ((2, 4), (1, 2)), "recent"),
}
STATE = BankState._fields
PLANNED = STATE[2:9]


def video(layout: BankLayout, streams: int, steps: int, dtype: torch.dtype = torch.float32, device="cpu") -> Tensor:
    drift = random_tensor(streams, steps, *layout.grid, layout.dim, dtype=torch.float64).cumsum(1) * 0.3
    start = random_tensor(streams, 1, *layout.grid, layout.dim, dtype=torch.float64, seed=1)
    return (drift + start).to(device, dtype)


def run(layout: BankLayout, frames: Tensor, impl: str, chunk: int = 1000, **options) -> BankState:
    state = layout.new_state(frames.shape[0], frames.device, frames.dtype)
    for start in range(0, frames.shape[1], chunk):
        parts = {n: x[:, start : start + chunk].contiguous() for n, x in options.items()}
        bank_push_(state, layout, frames[:, start : start + chunk].contiguous(), **parts, impl=impl)
    return state


def check(actual: BankState, low: BankState, wide: BankState) -> None:
    assert torch.equal(low.order, wide.order), "the case's margins are within rounding"
    for name in ("entry", "order", "counter"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(low, name).cpu()), name
    for name in ("slots", "mass", "clock"):
        assert_within_budget(getattr(actual, name), getattr(low, name), getattr(wide, name), name)


def same(a: BankState | BankPlan, b: BankState | BankPlan, layout: BankLayout, names=PLANNED) -> None:
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if name == "link" and layout.rule != "all-pairs":
            # the first place of a list has no neighbour before it
            x, y = x.clone(), y.clone()
            x[:, list(layout.first_link)] = y[:, list(layout.first_link)] = 0
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name


HALF = {"paper": torch.float16, "all-pairs": torch.float16, "videochat-online": torch.bfloat16, "merge": torch.bfloat16}


@pytest.mark.parametrize("name", CASES)
def test_triton_matches_reference(triton, name):
    layout, steps, dtype = CASES[name], 8, HALF.get(name, torch.float32)
    frames = video(layout, 2, steps, dtype)
    frames[1, 3] = float("nan")
    time = torch.arange(2 * steps, dtype=torch.float64).reshape(2, steps) * 0.5
    mask = random_tensor(2, steps, *layout.grid) > -0.5 if name == "paper-enters" else None
    options = {"time": time} | ({} if mask is None else {"mask": mask})
    maps, state = layout_maps(layout, frames), layout.new_state(2, "cpu", dtype)
    for part in (slice(0, 4), slice(4, steps)):
        cells = None if mask is None else mask[:, part]
        arguments = [frames[:, part], time[:, part], cells, torch.tensor([1, 0]), None]
        triton(MODULE, "bank_push_", *(t[:] for t in state), *arguments, maps, *layout.kernel_args)
    # row 0 went to stream 1
    state = BankState(*(t.flip(0) for t in state))
    check(state, run(layout, frames, "reference", **options), run(layout, frames.double(), "reference", **options))
    arguments = (
        frames,
        time,
        mask,
        maps,
        *layout.kernel_args,
        layout.descriptors,
        layout.key_dim,
        layout.pooled_cells,
    )
    plan = BankPlan(*triton(MODULE, "bank_plan", *arguments))
    same(plan, state, layout)
    arguments = (frames, mask, plan.pooled, plan.assign, plan.entry, maps, *layout.kernel_args)
    slots, mass = triton(MODULE, "bank_gather", *arguments)
    low, wide = (bank_gather(x, plan, layout, mask=mask, impl="reference") for x in (frames, frames.double()))
    assert_within_budget((slots, mass), tuple(low), tuple(wide))
    grads, weights = [], random_tensor(*slots.shape, dtype=dtype, seed=3)
    for kind in (frames, frames.double()):
        x = kind.nan_to_num(0.0).requires_grad_()
        out = bank_gather(x, plan, layout, mask=mask, impl="reference").slots
        grads += torch.autograd.grad(out, x, weights.to(x.dtype))
    arguments = (weights, mass, mask, plan.assign, maps, list(layout.grid), *layout.kernel_args)
    assert_within_budget(triton(MODULE, "bank_gather_backward", *arguments), *grads)


@pytest.mark.parametrize("name", ["paper-enters", "videochat-online", "all-pairs", "merge", "uniform"])
def test_triton_matches_reference_victims(triton, name):
    layout, steps = CASES[name], 9
    frames = video(layout, 2, steps)
    maps, state, low = layout_maps(layout, frames), layout.new_state(2, "cpu", frames.dtype), None
    low = layout.new_state(2, "cpu", frames.dtype)
    chosen = torch.randint(-1, layout.slots, (2, steps, layout.tiers), generator=torch.Generator().manual_seed(1))
    for t in range(steps):
        victim, frame = chosen[:, t].contiguous(), frames[:, t : t + 1].contiguous()
        lists = state.norm, state.link, state.entry, state.order, state.counter
        step = triton(MODULE, "bank_decide", *lists, torch.tensor([1, 0]), victim, *layout.kernel_args)
        want = bank_decide(low, layout, streams=torch.tensor([1, 0]), victim=victim, impl="reference")
        assert torch.equal(
            step, torch.cat([want.tier[:, None], want.fresh[:, None], want.merged[:, None], *want[3:]], 1)
        )
        rest = None, None, None, chosen[:, t : t + 1], maps, *layout.kernel_args
        triton(MODULE, "bank_push_", *(x[:] for x in state), frame, *rest)
        bank_push_(low, layout, frame, victim=chosen[:, t : t + 1], impl="reference")
        for column in ("entry", "order", "counter"):
            assert torch.equal(getattr(state, column), getattr(low, column)), column


TYPES = dict.fromkeys(("entry", "order", "counter", "step", "lists", "streams", "assign", "victim", "decided"), "*i64")
TYPES |= dict.fromkeys(("mass", "descriptor", "norm", "link", "table", "shifted", "seen"), "*fp32")
TYPES |= dict.fromkeys(("slots", "frames", "out", "small", "grad"), "*bf16")
TYPES |= {"clock": "*fp64", "time": "*fp64", "valid": "*i1", "t": "i32", "T": "i32", "state_streams": "i32"}
KERNELS = {
    "_decide_kernel": {},
    "_step_kernel": {},
    "_demote_kernel": {"tier": 0, "block_d": 512},
    "_merge_kernel": {"block_d": 512},
    "_enter_kernel": {"block_d": 512},
    "_describe_slot_kernel": {"block_c": 32, "block_d": 128},
    "_commit_kernel": {"block_c": 32},
    "_describe_kernel": {"block_c": 32, "block_d": 128},
    "_pool_last_kernel": {"block_d": 512},
    "_replay_kernel": {"block_c": 32, "block_d": 512},
    "_take_rows_kernel": {"block_d": 512},
    "_gather_kernel": {"tier": 0, "POOLED": False, "block_d": 256},
    "_gather_backward_kernel": {"block_d": 128},
}


@pytest.mark.usefixtures("triton_compiler")
def test_static_loops_and_shapes_get_constants_triton_3_6_knows():
    """There a field of a constexpr tuple is a plain number, which `static_range` and a shape refuse."""
    bare = []
    for source in sorted((Path(__file__).parent.parent / "kernels").glob("_bank_*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call):
                continue
            given = node.args if ast.unparse(node.func) == "tl.static_range" else []
            shapes = [x for arg in node.args if isinstance(arg, ast.Tuple) for x in arg.elts]
            bare += [f"{source.name}:{x.lineno}" for x in (*given, *shapes) if isinstance(x, ast.Attribute)]
    assert bare == []


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("rule", ["paper", "videochat-online", "all-pairs", "merge"])
def test_triton_compiles(rule, arch):
    from vmemory.kernels import _bank_push, _bank_video, bank
    from vmemory.kernels._bank_layout import geometry

    many = {"paper": (24, 24, 144), "videochat-online": (24, 24, 144), "all-pairs": (8, 4, 1), "merge": (64,)}[rule]
    grids = (12, 12, 8, 8, 6, 6) if rule == "all-pairs" else (16, 16, 8, 8, 4, 4)[: 2 * len(many)]
    levels = ((8, 4, 1), (0, 1, 2)) if rule == "videochat-online" else ((), ())
    descriptors = 1 if rule in ("paper", "merge") else 3
    g = geometry(many, grids, *levels, tuple(RULES[rule].numbers), 16, 16, 1152, descriptors, 1152)
    for name, constants in KERNELS.items():
        if (name == "_merge_kernel") != (rule == "merge") and name in ("_merge_kernel", "_demote_kernel"):
            continue
        if rule == "merge" and name == "_pool_last_kernel":
            continue
        kernel = getattr(_bank_push, name, None) or getattr(_bank_video, name)
        warps = bank.COMMIT_WARPS if name in ("_commit_kernel", "_replay_kernel") else 4
        compiled = compile_triton(kernel, TYPES, constants | {"g": g}, arch, num_warps=warps)
        assert compiled.spills == 0, name
        assert compiled.shared < A100_SHARED_BYTES, name


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_cuda_matches_reference(name, dtype, impl):
    layout, steps = CASES[name], 3 * CASES[name].slots + 1
    frames = video(layout, 3, steps, dtype)
    time = torch.arange(3 * steps, dtype=torch.float64).reshape(3, steps) * 0.5
    mask = random_tensor(3, steps, *layout.grid) > -0.5
    on_device = {"time": time.cuda(), "mask": mask.cuda()}
    with poisoned():
        state = run(layout, frames.cuda(), impl, 4, **on_device)
        plan = bank_plan(frames.cuda(), layout, **on_device, impl=impl)
        tokens = bank_gather(frames.cuda(), plan, layout, mask=mask.cuda(), impl="triton")
    parts = {"time": time, "mask": mask}
    low, wide = (run(layout, x, "reference", **parts) for x in (frames, frames.double()))
    check(state, low, wide)
    same(plan, state, layout)
    host = BankPlan(*(t.cpu() for t in plan))
    low, wide = (bank_gather(x, host, layout, mask=mask, impl="reference") for x in (frames, frames.double()))
    assert_within_budget(tuple(tokens), tuple(low), tuple(wide))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_cuda_gradients_match_reference(impl):
    layout = CASES["paper-enters"]
    frames = video(layout, 2, 12)
    plan = bank_plan(frames, layout, impl="reference")
    grads, weights = [], random_tensor(2, layout.rows, layout.dim)
    device_plan = BankPlan(*(t.cuda() for t in plan))
    for x, p, how in (
        (frames.cuda(), device_plan, "triton"),
        (frames, plan, "reference"),
        (frames.double(), plan, "reference"),
    ):
        x = x.detach().requires_grad_()
        out = bank_gather(x, p, layout, impl=how).slots
        grads += torch.autograd.grad(out, x, weights.to(x.device, x.dtype))
    assert_within_budget(*grads)


def big(dim: int = 1152) -> BankLayout:
    return BankLayout((16, 16), dim, dim, (6, 6, 12), ((16, 16), (8, 8), (4, 4)))


def replayed(step: Callable[[], None], times: int, before: Callable[[int], None]) -> None:
    """Capture `step` once, then replay it, with `before(i)` filling its input each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(times):
        before(i)
        graph.replay()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_graph_replay_equals_eager(impl):
    layout = big()
    steps = 3 * layout.slots + 1
    frames = video(layout, 2, steps, torch.bfloat16, "cuda")
    eager = run(layout, frames, impl, 1)
    state, buffer = layout.new_state(2, "cuda", torch.bfloat16), torch.empty_like(frames[:, :1])
    maps = layout_maps(layout, frames)
    # free slots hold whatever was in memory: none of it may leak
    for tensor in (state.slots, state.mass, state.descriptor, state.norm, state.link, state.clock):
        tensor.fill_(float("nan"))

    def step() -> None:
        bank_push_(state, layout, buffer, maps=maps, impl=impl)

    # compiles what has to be compiled, on a state of its own
    bank_push_(layout.new_state(2, "cuda", torch.bfloat16), layout, frames[:, :1], maps=maps, impl=impl)
    # and leaves NaN for the capture's workspace to be found in
    torch.full((1 << 22,), float("nan"), device="cuda")
    replayed(step, steps, lambda i: buffer.copy_(frames[:, i : i + 1]))
    same(state, eager, layout, ("slots", "mass", "entry", "order", "counter", "descriptor", "norm"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_nothing_waits_for_the_device(impl):
    layout = big(64)
    frames, state = video(layout, 2, 5, torch.bfloat16, "cuda"), layout.new_state(2, "cuda", torch.bfloat16)
    maps = layout_maps(layout, frames)
    bank_push_(state, layout, frames, maps=maps, impl=impl)
    bank_gather(frames, bank_plan(frames, layout, maps=maps, impl=impl), layout, maps=maps, impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank_push_(state, layout, frames, maps=maps, impl=impl)
        bank_gather(frames, bank_plan(frames, layout, maps=maps, impl=impl), layout, maps=maps, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_many_streams_decide_alone(impl):
    layout = big(96)
    frames = video(layout, 64, 40, torch.float16, "cuda")
    together = run(layout, frames, impl)
    order = torch.randperm(64)
    streams = order.clone()
    streams[::7] = -1
    some = layout.new_state(64, "cuda", torch.float16)
    bank_push_(some, layout, frames[order].contiguous(), streams=streams.cuda(), impl=impl)
    for s in range(64):
        row = (streams == s).nonzero().flatten()
        if len(row) == 0:
            assert int(some.counter[s].sum()) == 0
        else:
            for name in STATE:
                a, b = getattr(some, name)[s], getattr(together, name)[s]
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (s, name)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    # 72 slots of 16 * 16 * 8192 numbers in each of 16 streams
    layout = BankLayout((16, 16), 8192, 64, (72,), ((16, 16),), "recent")
    state = layout.new_state(16, "cuda", torch.bfloat16)
    assert state.slots.numel() > 2**31
    frames = video(BankLayout((16, 16), 8192, 64, (), ()), 1, 2, torch.bfloat16, "cuda").expand(16, -1, -1, -1, -1)
    for impl in ("native", "triton"):
        for _ in range(37):
            bank_push_(state, layout, frames, impl=impl)
        newest = layout.row_of(int(state.order[15, -1]))
        assert torch.equal(state.slots[15, newest : newest + 256], frames[15, -1].flatten(0, 1))
