"""Launchers of the tiered memory update."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vmemory.kernels._bank_layout import Geometry, geometry
from vmemory.kernels._bank_push import (
    _commit_kernel,
    _decide_kernel,
    _demote_kernel,
    _describe_slot_kernel,
    _enter_kernel,
    _merge_kernel,
    _step_kernel,
)
from vmemory.kernels._bank_step import HEAD, LENGTH, TIER
from vmemory.kernels._bank_video import (
    _describe_kernel,
    _gather_backward_kernel,
    _gather_kernel,
    _pool_last_kernel,
    _replay_kernel,
    _take_rows_kernel,
)
from vmemory.kernels._launch import channel_block, device_of, power_of_two

# the same for both kernels that sum dot products, so that streaming and replaying decide identically
COMMIT_WARPS = 8


def _scratch(rows: int, g: Geometry, order: Tensor, link: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the scratch of a step: head and tiers, the new lists, the kept links."""
    size = HEAD.value + g.tiers * TIER.value
    return order.new_empty((rows, size)), order.new_empty((rows, g.M)), link.new_empty((rows, g.P))


def bank_decide(
    norm: Tensor,
    link: Tensor,
    entry: Tensor,
    order: Tensor,
    counter: Tensor,
    streams: Tensor | None,
    victim: Tensor | None,
    capacities: list[int],
    grids: list[int],
    intervals: list[int],
    entries: list[int],
    rule: list[int],
) -> Tensor:
    g = geometry(
        tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), tuple(rule), 1, 1, 1, norm.shape[2], 1
    )
    S = counter.shape[0] if streams is None else streams.shape[0]
    streams, victim = (None if x is None else x.contiguous() for x in (streams, victim))
    step, lists, shifted = _scratch(S, g, order, link)
    out, which = order.new_empty((S, 3 + 2 * g.tiers)), (streams, counter.shape[0])
    with device_of(order):
        if S:
            _decide_kernel[(S,)](order, counter, link, entry, norm, victim, step, lists, shifted, *which, 0, 1, g)
            _step_kernel[(S,)](step, out, *which, g)
    return out


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
    scale: Tensor,
    frames: Tensor,
    time: Tensor | None,
    valid: Tensor | None,
    streams: Tensor | None,
    victim: Tensor | None,
    maps: Tensor,
    capacities: list[int],
    grids: list[int],
    intervals: list[int],
    entries: list[int],
    rule: list[int],
) -> None:
    S, T, H, W, D = frames.shape
    R, K = descriptor.shape[2:]
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), tuple(rule), H, W, D, R, K)
    frames = frames.contiguous()
    time, valid, streams, victim = (None if x is None else x.contiguous() for x in (time, valid, streams, victim))
    step, lists, shifted = _scratch(S, g, order, link)
    block_d, keys, block_c = channel_block(D, 512), channel_block(K, 128), min(32, power_of_two(H * W))
    blocks, which = triton.cdiv(D, block_d), (streams, slots.shape[0])
    cells = max((g.height[tier] * g.width[tier] for tier in g.entered), default=0)
    with device_of(frames):
        for t in range(T):
            _decide_kernel[(S,)](order, counter, link, entry, norm, victim, step, lists, shifted, *which, t, T, g)
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
    rule: list[int],
    maps_per_slot: int,
    key_dim: int,
    pooled_cells: int,
) -> tuple[Tensor, ...]:
    S, T, H, W, D = frames.shape
    R, K = maps_per_slot, key_dim
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), tuple(rule), H, W, D, R, K)
    frames = frames.contiguous()
    time, valid = (None if x is None else x.contiguous() for x in (time, valid))
    small = pooled_cells
    whole = torch.int64
    norm, link = maps.new_zeros((S, g.M, R)), maps.new_zeros((S, g.P))
    descriptor, seen = maps.new_empty((S, g.M, R, K)), maps.new_empty((S, T, R, K))
    entry, order = frames.new_full((S, g.M, 4), -1, dtype=whole), frames.new_full((S, g.M), -1, dtype=whole)
    clock = frames.new_zeros((S, g.M, 4), dtype=torch.float64)
    counter = frames.new_zeros((S, LENGTH.value + g.tiers), dtype=whole)
    assign, pool = frames.new_full((S, T), -1, dtype=whole), frames.new_empty((S, T, small, D))
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
    rule: list[int],
) -> tuple[Tensor, Tensor]:
    S, T, H, W, D = frames.shape
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), tuple(rule), H, W, D, 1, D)
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
    rule: list[int],
) -> Tensor:
    (S, T), (H, W), D = assign.shape, grid, grad.shape[2]
    g = geometry(tuple(capacities), tuple(grids), tuple(intervals), tuple(entries), tuple(rule), H, W, D, 1, D)
    grad, valid = grad.contiguous(), None if valid is None else valid.contiguous()
    out = grad.new_empty((S, T, H, W, D))
    block_d = channel_block(D, 128)
    with device_of(grad):
        if S * T:
            _gather_backward_kernel[(S * T, H * W, triton.cdiv(D, block_d))](
                grad, mass, valid, assign, maps, out, T, g, block_d
            )
    return out
