"""Update a tiered memory: frame by frame, or a whole video whose decisions come first and whose tokens move once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vmemory.ops._bank_quantized import move_tier
from vmemory.ops._checks import check_device, check_same, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.ops.grid_pool import grid_pool
from vmemory.reference import bank as _reference
from vmemory.reference.bank_layout import (
    CHOICES,
    LENGTH,
    STEP_FRESH,
    STEP_HEAD,
    STEP_MERGED,
    STEP_TIER,
    BankLayout,
    BankState,
    Step,
)

_DECIDE = Backends("bank_decide", cuda=True)
_PUSH = Backends("bank_push_", cuda=True)
_PLAN = Backends("bank_plan", cuda=True)
_GATHER = Backends("bank_gather")
_LAYOUT = "int[] capacities, int[] grids, int[] intervals, int[] entries, int[] rule"


class BankPlan(NamedTuple):
    """The decisions for a video: the final state of a new memory, without its tokens.

    `assign [S, T]` int64 names the slot each frame ends in, −1 = none; `pooled [S, T, cells, D]` holds every frame at
    the smallest tier's size, or nothing (cells = 0). The other fields are those of `BankState`.
    """

    descriptor: Tensor
    norm: Tensor
    link: Tensor
    entry: Tensor
    clock: Tensor
    order: Tensor
    counter: Tensor
    assign: Tensor
    pooled: Tensor


class BankTokens(NamedTuple):
    """Tokens of a planned memory: slots `[S, L, D]` and mass `[S, L]` float32, as in `BankState`."""

    slots: Tensor
    mass: Tensor


def _fake_push(*args: Any) -> None:
    return None


def _fake_plan(
    frames: Tensor, time: Tensor | None, mask: Tensor | None, maps: Tensor, capacities: list[int], grids: list[int],
    intervals: list[int], entries: list[int], rule: list[int], maps_per_slot: int, key_dim: int, pooled_cells: int,
) -> BankPlan:  # fmt: skip
    S, T, _, _, D = frames.shape
    M, n = sum(capacities), len(capacities)
    links = sum(c * c for c in capacities) if CHOICES[rule[0]] == "all" else M
    return BankPlan(
        descriptor=frames.new_empty((S, M, maps_per_slot, key_dim), dtype=maps.dtype),
        norm=frames.new_empty((S, M, maps_per_slot), dtype=maps.dtype),
        link=frames.new_empty((S, links), dtype=maps.dtype),
        entry=frames.new_empty((S, M, 4), dtype=torch.int64),
        clock=frames.new_empty((S, M, 4), dtype=torch.float64),
        order=frames.new_empty((S, M), dtype=torch.int64),
        counter=frames.new_empty((S, LENGTH + n), dtype=torch.int64),
        assign=frames.new_empty((S, T), dtype=torch.int64),
        pooled=frames.new_empty((S, T, pooled_cells, D)),
    )


def _fake_gather(
    frames: Tensor, mask: Tensor | None, pooled: Tensor, assign: Tensor, entry: Tensor, maps: Tensor,
    capacities: list[int], grids: list[int], intervals: list[int], entries: list[int], rule: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = sum(c * grids[2 * i] * grids[2 * i + 1] for i, c in enumerate(capacities))
    S, D = frames.shape[0], frames.shape[-1]
    return frames.new_empty((S, rows, D)), frames.new_empty((S, rows), dtype=torch.float32)


def _fake_gather_backward(
    grad: Tensor, mass: Tensor, mask: Tensor | None, assign: Tensor, maps: Tensor, grid: list[int], *layout: Any
) -> Tensor:
    return grad.new_empty((*assign.shape, *grid, grad.shape[-1]))


def _fake_decide(
    norm: Tensor, link: Tensor, entry: Tensor, order: Tensor, counter: Tensor, streams: Tensor | None, *layout: Any
) -> Tensor:
    rows = counter.shape[0] if streams is None else streams.shape[0]
    return order.new_empty((rows, STEP_HEAD + 2 * (counter.shape[1] - LENGTH)))


_decide = Op(
    "bank_decide",
    "(Tensor norm, Tensor link, Tensor entry, Tensor order, Tensor counter, Tensor? streams, Tensor? victim, "
    f"{_LAYOUT}) -> Tensor",
    _fake_decide,
    stem="bank",
)
_push = Op(
    "bank_push_",
    "(Tensor(a!) slots, Tensor(b!) mass, Tensor(c!) descriptor, Tensor(d!) norm, Tensor(e!) link, Tensor(f!) entry, "
    "Tensor(g!) clock, Tensor(h!) order, Tensor(i!) counter, Tensor(j!) scale, Tensor frames, Tensor? time, "
    f"Tensor? mask, Tensor? streams, Tensor? victim, Tensor maps, {_LAYOUT}) -> ()",
    _fake_push,
    stem="bank",
)
_plan = Op(
    "bank_plan",
    f"(Tensor frames, Tensor? time, Tensor? mask, Tensor maps, {_LAYOUT}, int maps_per_slot, int key_dim, "
    "int pooled_cells) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_plan,
    stem="bank",
)
_gather = Op(
    "bank_gather",
    f"(Tensor frames, Tensor? mask, Tensor pooled, Tensor assign, Tensor entry, Tensor maps, {_LAYOUT}) -> "
    "(Tensor, Tensor)",
    _fake_gather,
    stem="bank",
)
_gather_backward = Op(
    "bank_gather_backward",
    f"(Tensor grad, Tensor mass, Tensor? mask, Tensor assign, Tensor maps, int[] grid, {_LAYOUT}) -> Tensor",
    _fake_gather_backward,
    stem="bank",
)


def layout_maps(layout: BankLayout, like: Tensor) -> Tensor:
    """Return the layout's weight table on `like`'s device, in the dtype of accumulation; banks keep it for reuse."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return layout.packed_maps.to(device=like.device, dtype=wide)


def check_frames(frames: Tensor, layout: BankLayout, time: Tensor | None, mask: Tensor | None) -> None:
    """Check that frames, times and mask fit the layout and each other."""
    check_tensor("frames", frames, "[S, T, H, W, D]", floating=True)
    if tuple(frames.shape[2:]) != (*layout.grid, layout.dim):
        H, W = layout.grid
        raise ValueError(f"frames: expected [S, T, {H}, {W}, {layout.dim}], got shape {shape_of(frames)}")
    for name, x, dims, kind in (("time", time, 2, torch.float64), ("mask", mask, 4, torch.bool)):
        if x is None:
            continue
        want = frames.shape[:dims]
        if not isinstance(x, Tensor) or x.shape != want or x.dtype != kind:
            got = f"{shape_of(x)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected {kind} of shape {list(want)}, got {got}")
        check_device(name, x, "frames", frames)


def check_push(
    state: BankState,
    layout: BankLayout,
    frames: Tensor,
    time: Tensor | None,
    mask: Tensor | None,
    streams: Tensor | None,
    victim: Tensor | None = None,
) -> None:
    """Check what `check_frames` checks, and that frames, streams and victims fit the state."""
    check_frames(frames, layout, time, mask)
    if state.quantized:
        check_device("frames", frames, "the bank", state.slots)
        if mask is not None:
            raise ValueError("mask: expected None, a memory in 8 or 4 bits takes whole frames")
    else:
        check_same("frames", frames, "the bank", state.slots)
    rows = state.slots.shape[0] if streams is None else streams.shape[0]
    if frames.shape[0] != rows:
        raise ValueError(f"frames: expected {rows} streams, got {frames.shape[0]}")
    if victim is not None:
        _check_victim(victim, (*frames.shape[:2], layout.tiers), state)


def _check_victim(victim: Tensor, want: tuple[int, ...], state: BankState) -> None:
    if not isinstance(victim, Tensor) or tuple(victim.shape) != want or victim.dtype != torch.int64:
        got = f"{shape_of(victim)} {victim.dtype}" if isinstance(victim, Tensor) else type(victim).__name__
        raise ValueError(f"victim: expected torch.int64 of shape {list(want)}, got {got}")
    check_device("victim", victim, "state.order", state.order)


@with_backends(_DECIDE)
def bank_decide(
    state: BankState,
    layout: BankLayout,
    *,
    streams: Tensor | None = None,
    victim: Tensor | None = None,
    impl: Impl = "auto",
) -> Step:
    """Decide what the next frame of each stream changes in a tiered memory, without changing it.

    The content of the frame has no part in the choice, so no frame is needed. `bank_push_` makes the same decision, and
    accepts `Step.leaves[:, None]` as its `victim`.

    Args:
        state: Tensors of `layout.state_shapes`.
        layout: Tiers, grids and rule.
        streams: `[S]` int64, the stream of each row; −1 skips the row.
        victim: `[S, tiers]` int64, the slot that a tier gives up if it is full. A slot that the tier does not hold,
            such as −1, leaves the choice to the rule. A rule that merges folds the victim into its older neighbour.
        impl: Which implementation to run.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    rows = state.counter.shape[0] if streams is None else streams.shape[0]
    if victim is not None:
        _check_victim(victim, (rows, layout.tiers), state)
    picked = _DECIDE.pick(state.norm, impl)
    if picked == "reference":
        step = _reference.bank_decide(state, layout, streams, victim)
    else:
        lists = state.norm, state.link, state.entry, state.order, state.counter
        step = _decide(picked, *lists, streams, victim, *layout.kernel_args)
    heads = step[:, STEP_TIER], step[:, STEP_FRESH], step[:, STEP_MERGED]
    return Step(*heads, step[:, STEP_HEAD : STEP_HEAD + layout.tiers], step[:, STEP_HEAD + layout.tiers :])


@with_backends(_PUSH)
def bank_push_(
    state: BankState,
    layout: BankLayout,
    frames: Tensor,
    *,
    time: Tensor | None = None,
    mask: Tensor | None = None,
    streams: Tensor | None = None,
    victim: Tensor | None = None,
    maps: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Push frames into a tiered memory, in place: evict, pool, insert and re-link without host synchronisation.

    Decisions need the frames' means only: the cosines of list neighbours are stored, and three of them change per step.
    Tokens in 8 or 4 bits are dequantised to float32 to be pooled or merged, and quantised again.

    Args:
        state: Tensors of `layout.state_shapes`, changed in place.
        layout: Tiers, grids and rule.
        frames: `[S, T, H, W, D]`, taken in order of T, on the device of `state.slots` and of its dtype, or of any
            floating dtype where tokens are stored in 8 or 4 bits.
        time: `[S, T]` float64 seconds, strictly increasing along T; omitted = NaN.
        mask: `[S, T, H, W]` bool, True where a cell exists; pooling and means use these cells only.
        streams: `[S]` int64, the stream of each row, without repetition; −1 skips the row.
        victim: `[S, T, tiers]` int64, the slots that full tiers give up to each frame, as in `bank_decide`.
        maps: `layout_maps(layout, frames)` stored by the caller; omitted = computed for this call.
        impl: Which implementation to run.

    Raises:
        ValueError: A shape, dtype or device does not fit; nothing has changed.

    Source: VideoChat-Online's memory bank (arXiv 2501.00584), and the rules of `vmemory.reference.bank_layout.RULES`.
    """
    check_push(state, layout, frames, time, mask, streams, victim)
    push_checked_(state, layout, frames, time, mask, streams, victim, maps, impl)


def push_checked_(
    state: BankState,
    layout: BankLayout,
    frames: Tensor,
    time: Tensor | None,
    mask: Tensor | None,
    streams: Tensor | None,
    victim: Tensor | None,
    maps: Tensor | None,
    impl: Impl = "auto",
) -> None:
    """Run `bank_push_` on arguments that `check_push` has seen."""
    if frames.shape[0] == 0 or frames.shape[1] == 0:
        return
    frames, quantized = frames.detach(), state.quantized
    if quantized and frames.dtype == torch.float64:
        # what is stored has no more digits
        frames = frames.float()
    picked = _PUSH.pick(frames, impl)
    if picked == "reference":
        _reference.bank_push_(state, layout, frames, time, mask, streams, victim)
    elif quantized and frames.device.type != "cpu":
        _push_quantized_(state, layout, frames, time, streams, victim, picked)
    else:
        table = layout_maps(layout, frames) if maps is None else maps
        _push(picked, *state, frames, time, mask, streams, victim, table, *layout.kernel_args)


def _push_quantized_(
    state: BankState,
    layout: BankLayout,
    frames: Tensor,
    time: Tensor | None,
    streams: Tensor | None,
    victim: Tensor | None,
    picked: str,
) -> None:
    """Push frames into a memory in 8 or 4 bits on a device without a kernel for this dtype.

    The step is decided first. Tokens move by it, and a memory of the frames' means repeats it.
    """
    S, means = state.counter.shape[0], grid_pool(frames[..., : layout.key_dim], 1, stats=True).mean
    means = means.to(state.descriptor.dtype)[:, :, None, None]
    # tokens move stream by stream, so that no two rows write to the same address
    row = torch.arange(S, device=frames.device) if streams is None else _rows_of_streams(streams, S)
    fed, row = row >= 0, row.clamp_min(0)
    decider = layout.of_means
    tokens = means.new_empty((S, decider.rows, layout.key_dim)), state.mass.new_empty((S, decider.rows))
    held = state._replace(slots=tokens[0], mass=tokens[1], scale=state.scale[:, :0])
    maps = layout_maps(decider, means)
    for t in range(frames.shape[1]):
        chosen = None if victim is None else victim[row, t]
        step = bank_decide(state, layout, victim=chosen, impl=picked)
        frame = frames[:, t] if streams is None else frames[row, t]
        for tier in reversed(range(layout.tiers)):
            move_tier(state, layout, tier, step, frame, fed)
        when = None if time is None else time[:, t : t + 1]
        leaves = step.leaves if streams is None else step.leaves[streams.clamp(0, S - 1)]
        rest = when, None, streams, leaves[:, None].contiguous(), maps, *decider.kernel_args
        _push(picked, *held, means[:, t : t + 1].contiguous(), *rest)


def _rows_of_streams(streams: Tensor, S: int) -> Tensor:
    """Return the row `[S]` for each stream, −1 = none, from the stream of each row."""
    # the additional element takes the rows that are skipped
    there = torch.where((streams >= 0) & (streams < S), streams, S)
    rows = torch.full((S + 1,), -1, dtype=torch.int64, device=streams.device)
    return rows.scatter(0, there, torch.arange(streams.shape[0], device=streams.device))[:-1]


@with_backends(_PLAN)
def bank_plan(
    frames: Tensor,
    layout: BankLayout,
    *,
    time: Tensor | None = None,
    mask: Tensor | None = None,
    maps: Tensor | None = None,
    impl: Impl = "auto",
) -> BankPlan:
    """Decide what a new memory would keep of a whole video; reads its tokens once and moves none.

    Args:
        frames: `[S, T, H, W, D]`.
        layout, time, mask, maps, impl: As in `bank_push_`.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_frames(frames, layout, time, mask)
    return plan_checked(frames, layout, time, mask, maps, impl)


def plan_checked(
    frames: Tensor,
    layout: BankLayout,
    time: Tensor | None,
    mask: Tensor | None,
    maps: Tensor | None,
    impl: Impl = "auto",
) -> BankPlan:
    """Run `bank_plan` on arguments that `check_frames` has seen."""
    picked = _PLAN.pick(frames, impl)
    frames = frames.detach()
    if picked == "reference":
        state, assign = _reference.bank_plan(frames, layout, time, mask)
        return BankPlan(*state[2:9], assign, frames.new_empty((*frames.shape[:2], 0, layout.dim)))
    table = layout_maps(layout, frames) if maps is None else maps
    sizes = layout.descriptors, layout.key_dim, layout.pooled_cells
    return BankPlan(*_plan(picked, frames, time, mask, table, *layout.kernel_args, *sizes))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        mask: Tensor | None,
        pooled: Tensor,
        assign: Tensor,
        entry: Tensor,
        table: Tensor,
        layout: BankLayout,
        picked: str,
    ) -> tuple[Tensor, Tensor]:
        slots, mass = _gather(picked, frames, mask, pooled, assign, entry, table, *layout.kernel_args)
        ctx.save_for_backward(mass, mask, assign, table)
        ctx.layout, ctx.picked = layout, picked
        ctx.mark_non_differentiable(mass)
        return slots, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mass, mask, assign, table = ctx.saved_tensors
        layout = ctx.layout
        out = _gather_backward(ctx.picked, grad, mass, mask, assign, table, list(layout.grid), *layout.kernel_args)
        return out, None, None, None, None, None, None, None


@with_backends(_GATHER)
def bank_gather(
    frames: Tensor,
    plan: BankPlan,
    layout: BankLayout,
    *,
    mask: Tensor | None = None,
    maps: Tensor | None = None,
    impl: Impl = "auto",
) -> BankTokens:
    """Pool each survivor of a plan directly to its final size; differentiable in `frames`.

    Args:
        frames: `[S, T, H, W, D]`, the frames of `plan`.
        plan: The result of `bank_plan` for these frames.
        layout, mask, maps, impl: As in `bank_push_`.

    Returns:
        `BankTokens(slots [S, L, D], mass [S, L] float32)`, equal to pushing frame by frame up to rounding; free rows 0.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_frames(frames, layout, None, mask)
    if plan.assign.shape != frames.shape[:2]:
        raise ValueError(f"plan: expected a plan of {list(frames.shape[:2])} frames, got {list(plan.assign.shape)}")
    return gather_checked(frames, plan, layout, mask, maps, impl)


def gather_checked(
    frames: Tensor,
    plan: BankPlan,
    layout: BankLayout,
    mask: Tensor | None,
    maps: Tensor | None,
    impl: Impl = "auto",
) -> BankTokens:
    """Run `bank_gather` on arguments that it has checked, or that `plan` was made of."""
    picked = _GATHER.pick(frames, impl)
    if picked == "reference":
        return BankTokens(*_reference.bank_gather(frames, plan.assign, layout, mask))
    table = layout_maps(layout, frames) if maps is None else maps
    if torch.is_grad_enabled() and frames.requires_grad:
        kept = plan.pooled, plan.assign, plan.entry
        return BankTokens(*_Gather.apply(frames, mask, *kept, table, layout, picked))
    return BankTokens(*_gather(picked, frames, mask, plan.pooled, plan.assign, plan.entry, table, *layout.kernel_args))
