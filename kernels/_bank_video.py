"""Compress a whole video: describe every frame, replay the steps on descriptors, pool each survivor once."""

from __future__ import annotations

import triton.language as tl

from vmemory.kernels._bank_step import (
    FIRST,
    FRAME,
    HEAD,
    LAST,
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
    entry_tier,
    merged_share,
    move_entry,
    row_of,
)
from vmemory.kernels._bank_tokens import blend, count_cells, describe, nonzero_span, normalised, pooled
from vmemory.kernels._launch import jit


@jit
def _describe_kernel(
    frames, valid, table, seen, T, g: tl.constexpr, block_c: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * block_d + tl.arange(0, block_d)
    first = entry_tier((tl.program_id(0) % T).to(tl.int64), g)
    there = None
    if valid is not None:
        there = valid + f * g.H * g.W
    for k in tl.static_range(len(g.entered)):
        if first == g.entered[k]:
            out = seen + f * g.R * g.K
            describe(frames + f * g.H * g.W * g.D, there, table, out, d, g.entered[k], g, block_c, block_d)


@jit
def _pool_last_kernel(frames, valid, table, out, g: tl.constexpr, block_d: tl.constexpr):
    """Pool every frame to the last tier's size; all frames enter the first tier."""
    f = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1)
    d = tl.program_id(2).to(tl.int64) * block_d + tl.arange(0, block_d)
    last: tl.constexpr = g.tiers - 1
    width: tl.constexpr = g.width[last]
    there = None
    if valid is not None:
        there = valid + f * g.H * g.W
    total, held = pooled(
        frames + f * g.H * g.W * g.D, None, there, table + g.rows[0][last], table + g.columns[0][last], cell // width,
        cell % width, d, g.H, g.W, g.D, g.block_H, g.block_W, block_d,
    )  # fmt: skip
    at = out + (f * g.height[last] * width + cell) * g.D + d
    tl.store(at, normalised(total, held).to(out.dtype.element_ty), d < g.D)


@jit
def relabel(entry, step, assign, frame, g: tl.constexpr, block: tl.constexpr):
    """Update the slot of each frame after a step; `entry` is the state before the step."""
    merged = tl.load(step + STEP_MERGED)
    for tier in tl.static_range(tl.constexpr(g.tiers)):
        at = step + HEAD + tier * TIER
        slot, target = tl.load(at + SLOT), tl.load(at + TARGET)
        if slot >= 0:
            if g.rule.merge:
                target = tl.where(merged >= 0, merged, target)
            first, last = tl.load(entry + slot * 4 + FIRST), tl.load(entry + slot * 4 + LAST)
            for start in range(first, last + 1, block):
                k = start + tl.arange(0, block)
                there = (k <= last) & (tl.load(assign + k, k <= last, other=-1) == slot)
                tl.store(assign + k, tl.zeros((block,), tl.int64) + target, there)
            # frames of the next tier's slots may lie in the same range, handled by other threads
            tl.debug_barrier()
    tl.store(assign + frame, tl.load(step + STEP_FRESH))


@jit
def _replay_kernel(
    seen, norm, link, entry, clock, order, counter, assign, step, lists, shifted, time, valid, T, g: tl.constexpr,
    block_c: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Replay the steps of a stream on descriptors `seen [T, R, K]`; a merged slot uses its first frame's row."""
    s = tl.program_id(0).to(tl.int64)
    seen += s * T * g.R * g.K
    norm += s * g.M * g.R
    link += s * g.P
    entry += s * g.M * 4
    clock += s * g.M * 4
    order += s * g.M
    counter += s * (LENGTH + g.tiers)
    step += s * (HEAD + g.tiers * TIER)
    lists += s * g.M
    shifted += s * g.P
    for t in range(0, T):
        decide(order, counter, link, entry, norm, None, step, lists, shifted, g)
        tl.debug_barrier()
        relabel(entry, step, assign + s * T, tl.load(counter + SEEN), g, block_d)
        if g.rule.merge:
            merged = tl.load(step + STEP_MERGED)
            if merged >= 0:
                to = row_of(seen, entry, merged, 0, g, True)
                source = row_of(seen, entry, tl.load(step + HEAD + SLOT), 0, g, True)
                blend(to, source, merged_share(clock, step), g.K, block_d)
        tl.debug_barrier()
        for below in tl.static_range(tl.constexpr(g.tiers)):
            # the deepest tier moves first, so that no slot is overwritten before it is read
            at = step + HEAD + (g.tiers - 1 - below) * TIER
            source, target = tl.load(at + SLOT), tl.load(at + TARGET)
            if (source >= 0) & (target >= 0):
                move_entry(entry, clock, norm, source, target, g)
            tl.debug_barrier()
        if tl.load(step + STEP_FIRST) >= 0:
            there = None
            if valid is not None:
                there = valid + (s * T + t) * g.H * g.W
            when = tl.zeros((), tl.float64) + float("nan")
            if time is not None:
                when = tl.load(time + s * T + t)
            enter_entry(entry, clock, step, tl.load(counter + SEEN), when, count_cells(there, g, block_c), g)
        tl.debug_barrier()
        commit(seen, norm, link, entry, order, counter, step, lists, shifted, g, True)
        tl.debug_barrier()


@jit
def _take_rows_kernel(seen, entry, descriptor, T, g: tl.constexpr, block_d: tl.constexpr):
    """Copy the frames' descriptors to their slots; free slots get zeros."""
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * block_d + tl.arange(0, block_d)
    frame = tl.load(entry + slot * 4 + FRAME)
    at = ((slot // g.M) * T + tl.maximum(frame, 0)) * g.R * g.K
    row = tl.load(seen + at + d, d < tl.where(frame >= 0, g.R * g.K, 0), other=0.0)
    tl.store(descriptor + slot * g.R * g.K + d, row, d < g.R * g.K)


@jit
def _gather_kernel(
    frames, valid, small, assign, entry, table, slots, mass, T, tier: tl.constexpr, POOLED: tl.constexpr,
    g: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Pool survivors to their slots; a program handles one output cell of a tier and a block of channels."""
    # divided as 32-bit numbers, because a 64-bit division is a function call
    s = (tl.program_id(0) // g.capacity[tier]).to(tl.int64)
    slot = (g.slot0[tier] + tl.program_id(0) % g.capacity[tier]).to(tl.int64)
    cell = tl.program_id(1)
    d = tl.program_id(2).to(tl.int64) * block_d + tl.arange(0, block_d)
    width: tl.constexpr = g.width[tier]
    cells: tl.constexpr = g.height[tier] * width
    first, last = tl.load(entry + (s * g.M + slot) * 4 + FIRST), tl.load(entry + (s * g.M + slot) * 4 + LAST)
    row = s * g.L + g.row0[tier] + (slot - g.slot0[tier]) * cells + cell
    total, held = tl.zeros((block_d,), tl.float32), tl.zeros((), tl.float32)
    first = tl.where(first < T, first, -1)
    for n in range(tl.maximum(first, 0), tl.minimum(last, T - 1) + 1):
        if tl.load(assign + s * T + n) == slot:
            f = s * T + n
            source = entry_tier(n, g)
            there = None
            if valid is not None:
                there = valid + f * g.H * g.W
            for k in tl.static_range(len(g.entered)):
                if g.entered[k] <= tier:  # noqa: SIM102  the outer one is decided while compiling
                    if source == g.entered[k]:
                        # if the frame is already pooled to this size, only the weights are summed
                        more, weight = pooled(
                            frames + f * g.H * g.W * g.D, None, there, table + g.rows[g.entered[k]][tier],
                            table + g.columns[g.entered[k]][tier], cell // width, cell % width, d, g.H, g.W,
                            0 if POOLED else g.D, g.block_H, g.block_W, block_d,
                        )  # fmt: skip
                        total += more
                        held += weight
    out = normalised(total, held).to(slots.dtype.element_ty)
    if POOLED:
        at = small + ((s * T + tl.maximum(first, 0)) * cells + cell) * g.D + d
        out = tl.load(at, d < tl.where(first >= 0, g.D, 0), other=0.0)
    tl.store(slots + row * g.D + d, out, d < g.D)
    if tl.program_id(2) == 0:
        tl.store(mass + row, held * (g.H * g.W / cells))


@jit
def _gather_backward_kernel(
    grad, mass, valid, assign, table, out, T, g: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    """Compute the frames' gradient; a program handles one input cell and a block of channels."""
    s, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    f = s * T + t
    cell = tl.program_id(1)
    d = tl.program_id(2).to(tl.int64) * block_d + tl.arange(0, block_d)
    total = tl.zeros((block_d,), tl.float32)
    slot = tl.load(assign + f)
    counts = slot >= 0
    if valid is not None:
        counts = counts & (tl.load(valid + f * g.H * g.W + cell) != 0)
    source = entry_tier(t, g)
    y, x = cell // g.W, cell % g.W
    for tier in tl.static_range(tl.constexpr(g.tiers)):
        if counts & (slot >= g.slot0[tier]) & (slot < g.slot0[tier] + g.capacity[tier]):
            first_row = s * g.L + g.row0[tier] + (slot - g.slot0[tier]) * g.height[tier] * g.width[tier]
            for k in tl.static_range(len(g.entered)):
                if g.entered[k] <= tier:  # noqa: SIM102  the outer one is decided while compiling
                    if source == g.entered[k]:
                        rows = table + g.rows[g.entered[k]][tier] + y
                        columns = table + g.columns[g.entered[k]][tier] + x
                        i0, i1 = nonzero_span(rows, g.H, g.height[tier], g.block_h[tier])
                        j0, j1 = nonzero_span(columns, g.W, g.width[tier], g.block_w[tier])
                        for i in range(i0, i1):
                            for j in range(j0, j1):
                                weight = tl.load(rows + i * g.H) * tl.load(columns + j * g.W)
                                row = first_row + i * g.width[tier] + j
                                held = tl.load(mass + row) / (g.H * g.W / (g.height[tier] * g.width[tier]))
                                share = tl.where(held == 0, 0.0, weight / tl.where(held == 0, 1.0, held))
                                total += share * tl.load(grad + row * g.D + d, d < g.D, other=0.0).to(tl.float32)
    tl.store(out + (f * g.H * g.W + cell) * g.D + d, total.to(out.dtype.element_ty), d < g.D)
