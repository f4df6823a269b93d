"""Move tokens in 8 or 4 bits by a step, on devices whose kernels support floating tokens only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vmemory.ops.grid_pool import grid_pool
from vmemory.ops.quantize_slots import dequantize_slots, quantize_slots
from vmemory.reference.bank_layout import RULES, BankLayout, BankState, Step


def move_tier(state: BankState, layout: BankLayout, tier: int, step: Step, frame: Tensor, fed: Tensor) -> None:
    """Move the rows of one tier's victim to the step's target, then write the rows of a frame that enters the tier."""
    leaves, target, (h, w) = step.leaves[:, tier], step.target[:, tier], layout.grids[tier]
    if RULES[layout.rule].victim == "both":
        into, out = (_rows_of(layout, tier, slot) for slot in (step.merged, leaves))
        (mass, kept), (more, joined) = (_read(state, rows, layout.dim) for rows in (into, out))
        total = mass + more
        share = torch.where(total > 0, mass / total.clamp_min(1e-30), 0)[..., None]
        _write(state, into, fed & (step.merged >= 0), share * kept + (1 - share) * joined, total)
    if tier + 1 < layout.tiers:
        mass, held = _read(state, _rows_of(layout, tier, leaves), layout.dim)
        below = layout.grids[tier + 1]
        demoted = grid_pool(held.unflatten(1, (h, w)), below, _demote(layout)).flatten(1, 2)
        share = (mass.sum(1, keepdim=True) / layout.cells[tier + 1]).expand(demoted.shape[:2])
        _write(state, _rows_of(layout, tier + 1, target), fed & (target >= 0), demoted, share)
    if tier in layout.entered:
        tokens = (frame if (h, w) == layout.grid else grid_pool(frame, (h, w))).flatten(1, 2)
        share = state.mass.new_full(tokens.shape[:2], layout.grid[0] * layout.grid[1] / (h * w))
        _write(state, _rows_of(layout, tier, step.fresh), fed & (step.tier == tier), tokens, share)


def _demote(layout: BankLayout) -> Literal["area", "bilinear"]:
    return "bilinear" if RULES[layout.rule].demote == "bilinear" else "area"


def _rows_of(layout: BankLayout, tier: int, slot: Tensor) -> Tensor:
    """Return token rows `[S, n]` of slots `[S]` of a tier; of the first slot where there is none."""
    cells, first = layout.cells[tier], layout.first_slot[tier]
    at = (slot - first).clamp(0, layout.capacities[tier] - 1)
    return layout.first_row[tier] + at[:, None] * cells + torch.arange(cells, device=slot.device)


def _read(state: BankState, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return mass `[S, n]` and tokens `[S, n, D]` float32 of rows `[S, n]`."""
    return state.mass.gather(1, rows), dequantize_slots(state.slots, state.scale, rows=rows, dim=dim)


def _write(state: BankState, rows: Tensor, there: Tensor, tokens: Tensor, mass: Tensor) -> None:
    """Quantise `tokens [S, n, D]` to rows `[S, n]` of the streams marked in `there [S]`; others do not change."""
    values, scale = quantize_slots(tokens, 8 if state.slots.dtype == torch.int8 else 4)
    flat = (rows + state.mass.shape[1] * torch.arange(len(rows), device=rows.device)[:, None]).flatten()
    for buffer, new in ((state.slots, values), (state.scale, scale), (state.mass, mass)):
        held, fresh = buffer.flatten(0, 1), new.flatten(0, 1)
        keep = there.repeat_interleave(rows.shape[1]).view(-1, *[1] * (fresh.dim() - 1))
        held.index_copy_(0, flat, torch.where(keep, fresh, held.index_select(0, flat)))
