"""Push one frame into every stream's memory, with one launch per tier, so that no program waits for another."""

from __future__ import annotations

import triton.language as tl

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
from vmemory.kernels._launch import jit


@jit(do_not_specialize=["state_streams", "t", "T"])
def _decide_kernel(
    order, counter, link, entry, norm, victim, step, lists, shifted, streams, state_streams, t, T, g: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    s = stream_of(streams, i, state_streams)
    chosen = None
    if victim is not None:
        chosen = victim + (i * T + t) * g.tiers
    if s >= 0:
        decide(
            order + s * g.M, counter + s * (LENGTH + g.tiers), link + s * g.P, entry + s * g.M * 4,
            norm + s * g.M * g.R, chosen, step + i * (HEAD + g.tiers * TIER), lists + i * g.M, shifted + i * g.P, g,
        )  # fmt: skip


@jit(do_not_specialize=["state_streams"])
def _step_kernel(step, decided, streams, state_streams, g: tl.constexpr):
    """Convert a step's scratch to the operator's result: a head, then each tier's slot, then each tier's target."""
    i = tl.program_id(0).to(tl.int64)
    s = stream_of(streams, i, state_streams)
    at = step + i * (HEAD + g.tiers * TIER)
    to = decided + i * (3 + 2 * g.tiers)
    first = i * 0 - 1
    if s >= 0:
        first = tl.load(at + STEP_FIRST)
    there = first >= 0
    merged = tl.load(at + STEP_MERGED, there, other=-1)
    tl.store(to, first)
    tl.store(to + 1, tl.load(at + STEP_FRESH, there, other=-1))
    tl.store(to + 2, merged)
    for tier in tl.static_range(tl.constexpr(g.tiers)):
        tl.store(to + 3 + tier, tl.load(at + HEAD + tier * TIER + SLOT, there, other=-1))
        target = tl.load(at + HEAD + tier * TIER + TARGET, there & (merged < 0), other=-1)
        tl.store(to + 3 + g.tiers + tier, target)


@jit
def _demote_kernel(
    slots, mass, descriptor, norm, entry, clock, table, step, streams, state_streams, tier: tl.constexpr,
    g: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Move a tier's victim to the next tier; a program handles one output cell and a block of channels."""
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
                for r in tl.static_range(tl.constexpr(g.R)):
                    x = descriptor + ((s * g.M + source) * g.R + r) * g.K + d
                    y = descriptor + ((s * g.M + target) * g.R + r) * g.K + d
                    tl.store(y, tl.load(x, d < g.K), d < g.K)
                if tl.program_id(2) == 0:
                    move_entry(entry + s * g.M * 4, clock + s * g.M * 4, norm + s * g.M * g.R, source, target, g)


@jit
def _merge_kernel(
    slots, mass, descriptor, clock, step, streams, state_streams, g: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    """Merge the victim into its neighbour; a program handles one token, the last program the descriptor."""
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
                    # all warps must read the mass before it changes
                    tl.debug_barrier()
                    tl.store(mass + row_a, ma + mb)
            else:
                share = merged_share(clock + s * g.M * 4, at)
                blend(descriptor + (s * g.M + a) * g.K, descriptor + (s * g.M + b) * g.K, share, g.K, block_d)


@jit
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


@jit(do_not_specialize=["state_streams", "t", "T"])
def _enter_kernel(
    slots, mass, table, step, frames, valid, streams, state_streams, t, T, g: tl.constexpr, block_d: tl.constexpr
):  # fmt: skip
    """Write the new frame to its slot; a program handles one output cell and a block of channels."""
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


@jit(do_not_specialize=["state_streams", "t", "T"])
def _describe_slot_kernel(
    descriptor, table, step, frames, valid, streams, state_streams, t, T, g: tl.constexpr, block_c: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    """Write the new frame's descriptors; a program handles a block of channels."""
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


@jit(do_not_specialize=["state_streams", "t", "T"])
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
