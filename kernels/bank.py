"""The tiered memory update: decide, move, commit. Each level of the way down is a launch, so that no program waits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmemory.kernels._bank_layout import Geometry, geometry
from vmemory.kernels._bank_step import (
    HEAD,
    LENGTH,
    SEEN,
    SLOT,
    STEP_FIRST,
    STEP_FRESH,
    STEP_MERGED,
    TARGET,
    TIER,
    commit,
    decide,
    enter_entry,
    merged_share,
    move_entry,
)
from vmemory.kernels._bank_tokens import blend, count_cells, describe, normalised, pooled, stream_of
from vmemory.kernels._bank_video import (
    _describe_kernel,
    _gather_backward_kernel,
    _gather_kernel,
    _pool_last_kernel,
    _replay_kernel,
    _take_rows_kernel,
)
from vmemory.kernels._launch import channel_block, device_of, power_of_two

# of both kernels that sum dot products: streaming and replaying decide alike
COMMIT_WARPS = 8


@triton.jit
def _decide_kernel(
    order, counter, link, entry, norm, step, lists, shifted, streams, state_streams, g: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    s = stream_of(streams, i, state_streams)
    if s >= 0:
        decide(
            order + s * g.M, counter + s * (LENGTH + g.tiers), link + s * g.P, entry + s * g.M * 4,
            norm + s * g.M * g.R, step + i * (HEAD + g.tiers * TIER), lists + i * g.M, shifted + i * g.P, g,
        )  # fmt: skip


@triton.jit
def _demote_kernel(
    slots, mass, descriptor, norm, entry, clock, table, step, streams, state_streams, tier: tl.constexpr,
    g: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """A tier's victim into the next one: an output cell and a block of channels a program."""
    i = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1)
    d = tl.program_id(2).to(tl.int64) * block_d + tl.arange(0, block_d)
    s = stream_of(streams, i, state_streams)
    at = step + i * (HEAD + g.tiers * TIER)
    if s >= 0:
        source, target = tl.load(at + HEAD + tier * TIER + SLOT), tl.load(at + HEAD + tier * TIER + TARGET)
        if target >= 0:
            n: tl.constexpr = g.height[tier]
            m: tl.constexpr = g.width[tier]
            width: tl.constexpr = g.width[tier + 1]
            cells: tl.constexpr = g.height[tier + 1] * g.width[tier + 1]
            from_row = s * g.L + g.row0[tier] + (source - g.slot0[tier]) * n * m
            to_row = s * g.L + g.row0[tier + 1] + (target - g.slot0[tier + 1]) * cells + cell
            total, held = pooled(
                slots + from_row * g.D, mass + from_row, None, table + g.step_rows[tier], table + g.step_columns[tier],
                cell // width, cell % width, d, n, m, g.D, g.block_h[tier], g.block_w[tier], block_d,
            )  # fmt: skip
            tl.store(slots + to_row * g.D + d, normalised(total, held).to(slots.dtype.element_ty), d < g.D)
            if tl.program_id(2) == 0:
                tl.store(mass + to_row, held * (n * m / cells))
            if cell == 0:
                for r in tl.static_range(g.R):
                    x = descriptor + ((s * g.M + source) * g.R + r) * g.K + d
                    y = descriptor + ((s * g.M + target) * g.R + r) * g.K + d
                    tl.store(y, tl.load(x, d < g.K), d < g.K)
                if tl.program_id(2) == 0:
                    move_entry(entry + s * g.M * 4, clock + s * g.M * 4, norm + s * g.M * g.R, source, target, g)


@triton.jit
def _merge_kernel(
    slots, mass, descriptor, clock, step, streams, state_streams, g: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    """The victim into its neighbour: a token a program, the last one takes the descriptor."""
    i = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1)
    s = stream_of(streams, i, state_streams)
    at = step + i * (HEAD + g.tiers * TIER)
    cells: tl.constexpr = g.height[0] * g.width[0]
    if s >= 0:
        a, b = tl.load(at + STEP_MERGED), tl.load(at + HEAD + SLOT)
        if a >= 0:
            if cell < cells:
                row_a, row_b = s * g.L + a * cells + cell, s * g.L + b * cells + cell
                ma, mb = tl.load(mass + row_a), tl.load(mass + row_b)
                if mb != 0:
                    blend(slots + row_a * g.D, slots + row_b * g.D, ma / (ma + mb), g.D, block_d)
                    # every warp has read the mass
                    tl.debug_barrier()
                    tl.store(mass + row_a, ma + mb)
            else:
                share = merged_share(clock + s * g.M * 4, at)
                blend(descriptor + (s * g.M + a) * g.K, descriptor + (s * g.M + b) * g.K, share, g.K, block_d)


@triton.jit
def enter_cell(
    slots, mass, table, frame, valid, s, fresh, cell, d, tier: tl.constexpr, g: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    width: tl.constexpr = g.width[tier]
    cells: tl.constexpr = g.height[tier] * width
    if cell < cells:
        row = s * g.L + g.row0[tier] + (fresh - g.slot0[tier]) * cells + cell
        total, held = pooled(
            frame, None, valid, table + g.rows[tier][tier], table + g.columns[tier][tier], cell // width, cell % width,
            d, g.H, g.W, g.D, g.block_H, g.block_W, block_d,
        )  # fmt: skip
        tl.store(slots + row * g.D + d, normalised(total, held).to(slots.dtype.element_ty), d < g.D)
        if tl.program_id(2) == 0:
            tl.store(mass + row, held * (g.H * g.W / cells))


@triton.jit
def _enter_kernel(
    slots, mass, table, step, frames, valid, streams, state_streams, t, T, g: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    """The new frame into its slot: an output cell and a block of channels a program."""
    i = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1)
    d = tl.program_id(2).to(tl.int64) * block_d + tl.arange(0, block_d)
    s = stream_of(streams, i, state_streams)
    at = step + i * (HEAD + g.tiers * TIER)
    frame = frames + (i * T + t) * g.H * g.W * g.D
    there = None
    if valid is not None:
        there = valid + (i * T + t) * g.H * g.W
    if s >= 0:
        first, fresh = tl.load(at + STEP_FIRST), tl.load(at + STEP_FRESH)
        for k in tl.static_range(len(g.entered)):
            if first == g.entered[k]:
                enter_cell(slots, mass, table, frame, there, s, fresh, cell, d, g.entered[k], g, block_d)


@triton.jit
def _describe_slot_kernel(
    descriptor, table, step, frames, valid, streams, state_streams, t, T, g: tl.constexpr, block_c: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    """The new frame's descriptors: a block of channels a program."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * block_d + tl.arange(0, block_d)
    s = stream_of(streams, i, state_streams)
    at = step + i * (HEAD + g.tiers * TIER)
    there = None
    if valid is not None:
        there = valid + (i * T + t) * g.H * g.W
    if s >= 0:
        first, fresh = tl.load(at + STEP_FIRST), tl.load(at + STEP_FRESH)
        out = descriptor + (s * g.M + fresh) * g.R * g.K
        for k in tl.static_range(len(g.entered)):
            if first == g.entered[k]:
                describe(
                    frames + (i * T + t) * g.H * g.W * g.D, there, table, out, d, g.entered[k], g, block_c, block_d
                )


@triton.jit
def _commit_kernel(
    descriptor, norm, link, entry, clock, order, counter, step, lists, shifted, time, valid, streams, state_streams, t,
    T, g: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    s = stream_of(streams, i, state_streams)
    at = step + i * (HEAD + g.tiers * TIER)
    entry += s * g.M * 4
    counter += s * (LENGTH + g.tiers)
    if s >= 0:
        if tl.load(at + STEP_FIRST) >= 0:
            there = None
            if valid is not None:
                there = valid + (i * T + t) * g.H * g.W
            when = tl.zeros((), tl.float64) + float("nan")
            if time is not None:
                when = tl.load(time + i * T + t)
            cells = count_cells(there, g, block_c)
            enter_entry(entry, clock + s * g.M * 4, at, tl.load(counter + SEEN), when, cells, g)
        commit(
            descriptor + s * g.M * g.R * g.K, norm + s * g.M * g.R, link + s * g.P, entry, order + s * g.M, counter, at,
            lists + i * g.M, shifted + i * g.P, g, False,
        )  # fmt: skip


def _scratch(rows: int, g: Geometry, order: Tensor, link: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a step is to do: head and tiers, the new lists, the links that stay."""
    size = HEAD.value + g.tiers * TIER.value
    return order.new_empty((rows, size)), order.new_empty((rows, g.M)), link.new_empty((rows, g.P))


def bank_push_(
    slots: Tensor,
    mass: Tensor,
    descriptor: Tensor,
    norm: Tensor,
    link: Tensor,
    entry: Tensor,
    clock: Tensor,
    order: Tensor,
    counter: Tensor,
    frames: Tensor,
    time: Tensor | None,
    valid: Tensor | None,
    streams: Tensor | None,
    maps: Tensor,
    capacities: list[int],
    grids: list[int],
    intervals: list[int],
    entries: list[int],
    rule: str,
) -> None:
    S, T, H, W, D = frames.shape
    R, K = descriptor.shape[2:]
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), rule, H, W, D, R, K)
    frames, time, valid, streams = (None if x is None else x.contiguous() for x in (frames, time, valid, streams))
    step, lists, shifted = _scratch(S, g, order, link)
    block_d, keys, block_c = channel_block(D, 512), channel_block(K, 128), min(32, power_of_two(H * W))
    blocks, which = triton.cdiv(D, block_d), (streams, slots.shape[0])
    cells = max((g.height[tier] * g.width[tier] for tier in g.entered), default=0)
    with device_of(frames):
        for t in range(T):
            _decide_kernel[(S,)](order, counter, link, entry, norm, step, lists, shifted, *which, g)
            for tier in reversed(range(g.tiers - 1)):
                below = g.height[tier + 1] * g.width[tier + 1]
                _demote_kernel[(S, below, blocks)](
                    slots, mass, descriptor, norm, entry, clock, maps, step, *which, tier, g, block_d
                )
            if g.rule.merge and g.tiers:
                merged = g.height[0] * g.width[0] + 1
                _merge_kernel[(S, merged)](slots, mass, descriptor, clock, step, *which, g, block_d)
            if g.entered:
                _enter_kernel[(S, cells, blocks)](slots, mass, maps, step, frames, valid, *which, t, T, g, block_d)
                _describe_slot_kernel[(S, triton.cdiv(K, keys))](
                    descriptor, maps, step, frames, valid, *which, t, T, g, block_c, keys
                )
            _commit_kernel[(S,)](
                descriptor, norm, link, entry, clock, order, counter, step, lists, shifted, time, valid, *which, t, T,
                g, block_c, num_warps=COMMIT_WARPS,
            )  # fmt: skip


def bank_plan(
    frames: Tensor,
    time: Tensor | None,
    valid: Tensor | None,
    maps: Tensor,
    capacities: list[int],
    grids: list[int],
    intervals: list[int],
    entries: list[int],
    rule: str,
    maps_per_slot: int,
    key_dim: int,
) -> tuple[Tensor, ...]:
    S, T, H, W, D = frames.shape
    R, K = maps_per_slot, key_dim
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), rule, H, W, D, R, K)
    frames, time, valid = (None if x is None else x.contiguous() for x in (frames, time, valid))
    last = g.height[-1] * g.width[-1] if g.tiers else 0
    # a second read of the survivors is no dearer where the last tier is not much smaller than a frame
    small = last if g.tiers > 1 and not intervals and not g.rule.merge and 4 * last <= H * W else 0
    whole = {"dtype": torch.int64}
    norm, link = maps.new_zeros((S, g.M, R)), maps.new_zeros((S, g.P))
    descriptor, seen = maps.new_empty((S, g.M, R, K)), maps.new_empty((S, T, R, K))
    entry, order = frames.new_full((S, g.M, 4), -1, **whole), frames.new_full((S, g.M), -1, **whole)
    clock = frames.new_zeros((S, g.M, 4), dtype=torch.float64)
    counter = frames.new_zeros((S, LENGTH.value + g.tiers), **whole)
    assign, pool = frames.new_full((S, T), -1, **whole), frames.new_empty((S, T, small, D))
    step, lists, shifted = _scratch(S, g, order, link)
    block_c, block_d = min(32, power_of_two(H * W)), channel_block(D, 512)
    keys, rows = channel_block(K, 128), channel_block(R * K, 512)
    with device_of(frames):
        if S * T and g.entered:
            _describe_kernel[(S * T, triton.cdiv(K, keys))](frames, valid, maps, seen, T, g, block_c, keys)
        if S * T * small:
            _pool_last_kernel[(S * T, small, triton.cdiv(D, block_d))](frames, valid, maps, pool, g, block_d)
        if S * T:
            _replay_kernel[(S,)](
                seen, norm, link, entry, clock, order, counter, assign, step, lists, shifted, time, valid, T, g,
                block_c, block_d, num_warps=COMMIT_WARPS,
            )  # fmt: skip
        if S * g.M:
            _take_rows_kernel[(S * g.M, triton.cdiv(R * K, rows))](seen, entry, descriptor, T, g, rows)
    return descriptor, norm, link, entry, clock, order, counter, assign, pool


def bank_gather(
    frames: Tensor,
    valid: Tensor | None,
    pooled: Tensor,
    assign: Tensor,
    entry: Tensor,
    maps: Tensor,
    capacities: list[int],
    grids: list[int],
    intervals: list[int],
    entries: list[int],
    rule: str,
) -> tuple[Tensor, Tensor]:
    S, T, H, W, D = frames.shape
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), rule, H, W, D, 1, D)
    frames, valid = frames.contiguous(), None if valid is None else valid.contiguous()
    slots, mass = frames.new_empty((S, g.L, D)), frames.new_empty((S, g.L), dtype=torch.float32)
    block_d = channel_block(D, 256)
    with device_of(frames):
        for tier in range(g.tiers if S else 0):
            grid = S * capacities[tier], g.height[tier] * g.width[tier], triton.cdiv(D, block_d)
            ready = pooled.shape[2] > 0 and tier == g.tiers - 1
            _gather_kernel[grid](frames, valid, pooled, assign, entry, maps, slots, mass, T, tier, ready, g, block_d)
    return slots, mass


def bank_gather_backward(
    grad: Tensor,
    mass: Tensor,
    valid: Tensor | None,
    assign: Tensor,
    maps: Tensor,
    grid: list[int],
    capacities: list[int],
    grids: list[int],
    intervals: list[int],
    entries: list[int],
    rule: str,
) -> Tensor:
    (S, T), (H, W), D = assign.shape, grid, grad.shape[2]
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), rule, H, W, D, 1, D)
    grad, valid = grad.contiguous(), None if valid is None else valid.contiguous()
    out = grad.new_empty((S, T, H, W, D))
    block_d = channel_block(D, 128)
    with device_of(grad):
        if S * T:
            _gather_backward_kernel[(S * T, H * W, triton.cdiv(D, block_d))](
                grad, mass, valid, assign, maps, out, T, g, block_d
            )
    return out
