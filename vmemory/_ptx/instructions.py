"""Instructions that move data or use other lanes: memory, shuffles, matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from vmemory._ptx.lanes import WARP, Lanes
from vmemory._ptx.program import Address, Instruction, PtxError
from vmemory._ptx.values import NUMPY, decode, unsigned, width

__all__ = ["INSTRUCTIONS", "is_barrier", "is_warp_wide"]

_EVERY_LANE = np.uint32(0xFFFFFFFF)


def is_barrier(i: Instruction) -> bool:
    """Return whether an instruction waits for all lanes of a program."""
    return i.name == "bar" and "warp" not in i.modifiers


def is_warp_wide(i: Instruction) -> bool:
    """Return whether an instruction waits for all lanes of a warp."""
    return i.name in ("shfl", "redux", "ldmatrix", "mma") or (i.name == "bar" and "warp" in i.modifiers)


def _registers(operand: Any) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _space(i: Instruction) -> str:
    for space in ("param", "shared", "global"):
        if space in i.modifiers:
            return space
    raise PtxError("expected an access to global or shared memory")


def _nothing(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Ignore what has no effect in lock step."""


def _move(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Copy a register, pack parts into one or unpack one into parts, the lowest first."""
    to, source = i.operands
    if isinstance(to, tuple):
        part = width(i.kind) // len(to)
        bits = np.ascontiguousarray(lanes.each(source, i.kind)).view(unsigned(part)).reshape(lanes.count, -1)
        for k, name in enumerate(to):
            lanes.write(name, bits[:, k], f"b{8 * part}", active)
    elif isinstance(source, tuple):
        kind = f"b{8 * width(i.kind) // len(source)}"
        parts = np.stack([lanes.each(name, kind) for name in source], 1)
        lanes.write(to, parts.view(unsigned(width(i.kind)))[:, 0], i.kind, active)
    else:
        lanes.write(to, lanes.read(source, i.kind), i.kind, active)


def _load(lanes: Lanes, i: Instruction, active: Any) -> None:
    to, address = _registers(i.operands[0]), i.operands[1]
    assert isinstance(address, Address)
    if _space(i) == "param":
        lanes.write(to[0], decode(lanes.argument(address.base), i.kind), i.kind, active)
        return
    found = lanes.load(_space(i), lanes.addresses(address), width(i.kind), len(to), active)
    for k, name in enumerate(to):
        lanes.write(name, found[:, k].view(NUMPY[i.kind]), i.kind, active)


def _store(lanes: Lanes, i: Instruction, active: Any) -> None:
    address = i.operands[0]
    assert isinstance(address, Address)
    bits = f"b{8 * width(i.kind)}"
    values = np.stack([lanes.each(name, bits) for name in _registers(i.operands[1])], 1)
    lanes.store(_space(i), lanes.addresses(address), values, active)


_ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _atomic(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Update memory. The old value is not kept, since lanes have no order here; a kernel that reads it is refused."""
    address, value = i.operands[-2:]
    assert isinstance(address, Address)
    function = next((_ATOMIC[m] for m in i.modifiers if m in _ATOMIC), None)
    if function is None:
        raise PtxError("this atomic operation is not known here")
    chosen = slice(None) if active is None else active
    values = lanes.each(value, i.kind)[chosen]
    lanes.memory[_space(i)].combine(function, lanes.addresses(address)[chosen], values, lanes.owner[chosen])


def _copy(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Copy bytes from global to shared memory at once, or zeros where a lane asks for no bytes."""
    if i.kind in ("commit_group", "wait_group", "wait_all"):
        return
    to, source, size, *asked = i.operands
    assert isinstance(to, Address)
    assert isinstance(source, Address)
    total = int(str(size), 0)
    wanted = lanes.each(asked[0] if asked else size, "u32")
    active = np.ones(lanes.count, bool) if active is None else active
    if (active & (wanted != 0) & (wanted != total)).any():
        raise PtxError("expected all bytes or none to be copied")
    element = min(total, 8)
    found = lanes.load("global", lanes.addresses(source), element, total // element, active & (wanted != 0))
    lanes.store("shared", lanes.addresses(to), found, active)


def _expect_every_lane(lanes: Lanes, name: Any) -> None:
    if (lanes.read(name, "u32") != _EVERY_LANE).any():
        raise PtxError("expected a mask of every lane of the warp")


def _meet(lanes: Lanes, i: Instruction, active: Any) -> None:
    _expect_every_lane(lanes, i.operands[0])


def _shuffle(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Read another lane's value. `limit` holds the last lane to read from, and above it the bits of a segment."""
    to, source, distance, limit, mask = i.operands
    _expect_every_lane(lanes, mask)
    lane, last = lanes.lane.astype(np.int64), lanes.each(limit, "u32").astype(np.int64)
    own, last = (last >> 8) & 31, last & 31
    by = lanes.each(distance, "u32").astype(np.int64) & 31
    end = (lane & own) | (last & ~own)
    if "up" in i.modifiers:
        other = lane - by
        inside = other >= end
    else:
        other = {
            "down": lambda: lane + by,
            "bfly": lambda: lane ^ by,
            "idx": lambda: (lane & own) | (by & ~own),
        }[i.modifiers[1]]()
        inside = other <= end
    other = np.where(inside, other, lane)
    values = lanes.each(source, "b32")
    lanes.write(to, values[np.arange(lanes.count) - lane + other], "b32", active)


def _reduce(lanes: Lanes, i: Instruction, active: Any) -> None:
    _expect_every_lane(lanes, i.operands[2])
    values = lanes.each(i.operands[1], i.kind).reshape(-1, WARP)
    reduced = _ATOMIC[i.modifiers[1]].reduce(values, axis=1, dtype=values.dtype)
    lanes.write(i.operands[0], np.repeat(reduced, WARP), i.kind, active)


def _load_matrices(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Load 8 x 8 matrices of 2 bytes: lane 8 m + r has the address of row r of matrix m; each lane gets a pair."""
    to, address = _registers(i.operands[0]), i.operands[1]
    assert isinstance(address, Address)
    giving = lanes.lane < 8 * len(to)
    rows = lanes.load("shared", lanes.addresses(address), 2, 8, giving if active is None else giving & active)
    matrices = rows.reshape(-1, 4, 8, 8)
    if "trans" in i.modifiers:
        matrices = matrices.swapaxes(2, 3)
    lane = np.arange(WARP)
    for m, name in enumerate(to):
        pairs = matrices[:, m, lane // 4].reshape(-1, WARP, 4, 2)[:, lane, lane % 4]
        lanes.write(name, np.ascontiguousarray(pairs).view(np.uint32).reshape(-1), "b32", active)


def _multiply_matrices(lanes: Lanes, i: Instruction, active: Any) -> None:
    """Compute D = A B + C for each warp, whose lanes hold the matrices as the PTX manual's tables say, in float64."""
    shape = re.fullmatch(r"m16n8k(\d+)", i.modifiers[2])
    result, left, right, added = i.modifiers[-4:]
    if shape is None or left != right or result != added or i.modifiers[3:5] != ("row", "col"):
        raise PtxError("this shape is not known here")
    k = int(shape[1])
    # numbers that a register of A and B holds
    packed = 4 // width(left)
    lane = np.arange(WARP)
    group, member = lane // 4, lane % 4

    def numbers(name: str) -> Any:
        bits = np.ascontiguousarray(lanes.each(name, "b32")).view(unsigned(width(left)))
        return decode(bits, left).astype(np.float64).reshape(-1, WARP, packed)

    a, b = np.empty((lanes.count // WARP, 16, k)), np.empty((lanes.count // WARP, k, 8))
    column = (member * packed)[:, None] + np.arange(packed)
    to, *given = (_registers(operand) for operand in i.operands)
    for register, name in enumerate(given[0]):
        a[:, (group + 8 * (register % 2))[:, None], column + 4 * packed * (register // 2)] = numbers(name)
    for register, name in enumerate(given[1]):
        b[:, column + 4 * packed * register, group[:, None]] = numbers(name)
    product = a @ b
    for register, (name, start) in enumerate(zip(to, given[2], strict=True)):
        part = product[:, group + 8 * (register // 2), member * 2 + register % 2].reshape(-1)
        value = lanes.each(start, result).astype(np.float64) + part
        lanes.write(name, value.astype(NUMPY[result]), result, active)


INSTRUCTIONS: dict[str, Callable[[Lanes, Instruction, Any], None]] = {
    "mov": _move,
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy,
    "bar": _meet,
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": _load_matrices,
    "mma": _multiply_matrices,
    "fence": _nothing,
    "membar": _nothing,
}
