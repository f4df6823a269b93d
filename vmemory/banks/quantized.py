"""Banks that store tokens in 8 or 4 bits: decisions on frame means in full precision, tokens rounded when they move."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmemory.banks.unbroken import unbroken
from vmemory.ops._checks import check_floating
from vmemory.ops.bank import bank_push_, check_frames
from vmemory.ops.grid_pool import grid_pool
from vmemory.ops.quantize_slots import dequantize_slots, quantize_slots
from vmemory.reference.bank_layout import FRAME, LAST, RULES, SEEN, BankLayout, BankState

STORAGE = {"int8": torch.int8, "int4": torch.uint8}


class QuantizedState(NamedTuple):
    """`BankState` whose slots are int8 `[S, L, D]`, or uint8 `[S, L, ceil(D / 2)]` with two channels a byte.

    scale `[S, L]` float32: a token is its values times its scale.
    """

    slots: Tensor
    mass: Tensor
    descriptor: Tensor
    norm: Tensor
    link: Tensor
    entry: Tensor
    clock: Tensor
    order: Tensor
    counter: Tensor
    scale: Tensor


AnyState = BankState | QuantizedState


def storage_of(dtype: torch.dtype | str) -> torch.dtype:
    """What tokens are stored in: the dtype itself, int8 for `"int8"`, uint8 for `"int4"`.

    Raises:
        ValueError: Neither a floating dtype nor one of these names.
    """
    storage = STORAGE.get(dtype) if isinstance(dtype, str) else dtype
    if storage is None or not (storage.is_floating_point or isinstance(dtype, str)):
        raise ValueError(f"dtype: expected a floating dtype, 'int8' or 'int4', got {dtype!r}")
    return storage


def name_of(dtype: torch.dtype | str) -> str:
    """The dtype as files and command lines write it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype | str:
    """What `name_of` named.

    Raises:
        ValueError: Nothing of that name.
    """
    dtype = name if name in STORAGE else getattr(torch, name, None)
    if not isinstance(dtype, (str, torch.dtype)):
        raise ValueError(f"dtype: expected the name of a dtype, got {name!r}")
    return dtype


def new_state(
    layout: BankLayout, streams: int, device: torch.device | str, dtype: torch.dtype | str
) -> BankState | QuantizedState:
    """An empty memory, a `BankState` or a `QuantizedState`.

    Raises:
        ValueError: As `storage_of`, or tiers whose reductions change a frame's mean cannot be stored in few bits.
    """
    storage = storage_of(dtype)
    if storage.is_floating_point:
        return layout.new_state(streams, device, storage)
    if layout.slots and layout.descriptors > 1:
        grids = ", ".join(map(str, layout.grids))
        raise ValueError(
            f"dtype: {dtype!r} expects grids whose reductions keep a frame's mean, such as halves, got {grids}"
        )
    empty = layout.new_state(streams, "meta", torch.float32)
    stored = layout.dim if storage == torch.int8 else (layout.dim + 1) // 2
    made = {name: torch.zeros_like(x, device=device) for name, x in empty._asdict().items() if name != "slots"}
    made["slots"] = torch.zeros((streams, layout.rows, stored), dtype=storage, device=device)
    made["scale"] = torch.zeros((streams, layout.rows), device=device)
    made["entry"].fill_(-1)
    made["order"].fill_(-1)
    return QuantizedState(**made)


def new_bytes(layout: BankLayout, streams: int, dtype: torch.dtype | str) -> int:
    """Bytes of `new_state`'s tensors."""
    return sum(x.numel() * x.element_size() for x in new_state(layout, streams, "meta", dtype))


def check_quantized_push(
    layout: BankLayout, rows: int, frames: Tensor, times: Tensor | None, valid: Tensor | None
) -> None:
    """What `check_push` checks; frames of any floating dtype are stored, and only whole ones."""
    check_floating("frames", frames)
    check_frames(frames, layout, times, None)
    if frames.shape[0] != rows:
        raise ValueError(f"frames: expected {rows} streams, got {frames.shape[0]}")
    if valid is not None:
        raise ValueError("valid: expected None, a bank in 8 or 4 bits takes whole frames")


def decider_of(layout: BankLayout) -> BankLayout:
    """The memory of frame means that decides alike."""
    ones = ((1, 1),) * layout.tiers
    decider = BankLayout(
        (1, 1), layout.key_dim, layout.key_dim, layout.capacities, ones, layout.rule, layout.intervals, layout.entries
    )
    # what layouts keep is worked out here, where no compiler watches
    for each in (layout, decider):
        for name in ("first_slot", "first_row", "cells", "tier_of", "packed_maps", "descriptors", "entered"):
            getattr(each, name)
    return decider


def push_quantized_(
    state: QuantizedState,
    layout: BankLayout,
    decider: BankLayout,
    frames: Tensor,
    times: Tensor | None,
    streams: Tensor | None,
) -> None:
    """`bank_push_` for a `QuantizedState`; `frames [S', T, H, W, D]` of any floating dtype, `decider` of `layout`.

    The kernel decides on means alone. Each frame then enters, moves down a tier or is merged as it did: what moves is
    brought back to float32, reduced and rounded again.
    """
    S = state.counter.shape[0]
    stream = torch.arange(S, device=frames.device)
    row = stream if streams is None else rows_of_streams(streams, S)
    means = grid_pool(frames[..., : layout.key_dim], 1, stats=True).mean.to(state.descriptor.dtype)
    # reducing one cell to one cell
    maps = means.new_ones(decider.packed_maps.numel())
    for t in range(frames.shape[1]):
        with unbroken():
            seen, before = state.counter[:, SEEN].clone(), state.entry.clone()
            # written and never read
            tokens = means.new_empty((S, layout.slots, layout.key_dim))
            bank_push_(
                BankState(tokens, means.new_ones((S, layout.slots), dtype=torch.float32), *state[2:9]),
                decider, means[:, t, None, None, None], time=None if times is None else times[:, t : t + 1],
                streams=streams, maps=maps,
            )  # fmt: skip
            frame = frames[:, t] if streams is None else frames[row.clamp_min(0), t]
            for tier in reversed(range(layout.tiers)):
                _move(state, layout, tier, before, seen, frame)


def rows_of_streams(streams: Tensor, S: int) -> Tensor:
    """The row `[S]` that feeds each stream, −1 = none, from the stream of each row."""
    # one place more for the rows that are skipped
    there = torch.where((streams >= 0) & (streams < S), streams, S)
    rows = torch.full((S + 1,), -1, dtype=torch.int64, device=streams.device)
    return rows.scatter(0, there, torch.arange(streams.shape[0], device=streams.device))[:-1]


def _demote(layout: BankLayout) -> Literal["area", "bilinear"]:
    return "bilinear" if RULES[layout.rule].demote == "bilinear" else "area"


def _move(state: QuantizedState, layout: BankLayout, tier: int, before: Tensor, seen: Tensor, frame: Tensor) -> None:
    """Bring one tier's tokens to what its entries say now; at most one entry arrives in a step."""
    first, capacity = layout.first_slot[tier], layout.capacities[tier]
    old, new = before[:, first : first + capacity], state.entry[:, first : first + capacity]
    arrived = (new[..., FRAME] != old[..., FRAME]) & (new[..., FRAME] >= 0)
    slot, there = arrived.int().argmax(1), arrived.any(1)
    if RULES[layout.rule].victim == "both":
        grown = (new[..., LAST] != old[..., LAST]) & ~arrived & (new[..., FRAME] >= 0)
        _merge(state, layout, tier, grown.int().argmax(1), slot, grown.any(1))
    (H, W), (h, w) = layout.grid, layout.grids[tier]
    enters = tier == 0 or tier in layout.entered
    if enters:
        tokens = (frame if (h, w) == (H, W) else grid_pool(frame, (h, w))).flatten(1, 2)
    if tier > 0:
        number = new[..., FRAME].gather(1, slot[:, None])
        above, size = layout.first_slot[tier - 1], layout.capacities[tier - 1]
        source = (before[:, above : above + size, FRAME] == number).int().argmax(1)
        shape = (len(slot), *layout.grids[tier - 1], layout.dim)
        held = read_tokens(state, slot_rows(layout, tier - 1, source), layout.dim).view(shape)
        demoted = grid_pool(held, (h, w), _demote(layout)).flatten(1, 2)
        tokens = torch.where((number == seen[:, None])[..., None], tokens.float(), demoted) if enters else demoted
    mass = torch.full(tokens.shape[:2], H * W / (h * w), device=tokens.device)
    write_tokens(state, slot_rows(layout, tier, slot), there, tokens, mass)


def _merge(state: QuantizedState, layout: BankLayout, tier: int, into: Tensor, out: Tensor, there: Tensor) -> None:
    rows, others = slot_rows(layout, tier, into), slot_rows(layout, tier, out)
    mass, more = state.mass.gather(1, rows), state.mass.gather(1, others)
    total = mass + more
    share = torch.where(total > 0, mass / total.clamp_min(1e-30), 1)[..., None]
    kept, joined = (read_tokens(state, r, layout.dim) for r in (rows, others))
    write_tokens(state, rows, there, torch.where(share < 1, share * kept + (1 - share) * joined, kept), total)


def slot_rows(layout: BankLayout, tier: int, slot: Tensor) -> Tensor:
    """Token rows `[S, n]` of slot `[S]` of a tier, counted from the tier's first."""
    cells = layout.cells[tier]
    return layout.first_row[tier] + slot[:, None] * cells + torch.arange(cells, device=slot.device)


def read_tokens(state: QuantizedState, rows: Tensor, dim: int) -> Tensor:
    """Tokens `[S, n, D]` float32 of rows `[S, n]`."""
    return dequantize_slots(state.slots, state.scale, rows=rows, dim=dim)


def write_tokens(state: QuantizedState, rows: Tensor, there: Tensor, tokens: Tensor, mass: Tensor) -> None:
    """Store `tokens [S, n, D]` in rows `[S, n]` of the streams `there [S]`; the others keep what they hold."""
    values, scale = quantize_slots(tokens, 8 if state.slots.dtype == torch.int8 else 4)
    S = rows.shape[0]
    flat = rows.flatten()
    if S > 1:
        flat = (rows + state.mass.shape[1] * torch.arange(S, device=rows.device)[:, None]).flatten()
    for buffer, new in ((words(state.slots), words(values)), (state.scale, scale), (state.mass, mass)):
        held = buffer.flatten(0, 1)
        keep = there.view(S, *[1] * (new.dim() - 1))
        old = held.index_select(0, flat).view(new.shape)
        held.index_copy_(0, flat, torch.where(keep, new, old).flatten(0, 1))


def words(codes: Tensor) -> Tensor:
    """Contiguous codes, eight bytes an element where their number allows: what only moves bytes moves them faster."""
    return codes.view(torch.int64) if codes.shape[-1] % 8 == 0 else codes
