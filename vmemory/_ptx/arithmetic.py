"""Instructions that use neither memory nor other lanes: values in, value out, all lanes at once.

Rounding is to nearest; `fma` rounds once, through float64; approximate forms (`ex2.approx`, `div.full`) are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vmemory._ptx.program import Instruction, PtxError
from vmemory._ptx.values import NUMPY, encode, width

__all__ = ["Operation", "operation"]


@dataclass(frozen=True)
class Operation:
    """Types of an instruction's operands and of its result, and the function between them."""

    sources: tuple[str, ...]
    result: str
    function: Callable[..., Any]


_KNOWN: dict[str, tuple[frozenset[str], Callable[[Instruction], Operation]]] = {}


def _define(names: str, modifiers: str = "") -> Callable[[Callable], Callable]:
    """Register a maker of operations. A modifier that is not named is refused, since it would change the result."""

    def add(make: Callable[[Instruction], Operation]) -> Callable[[Instruction], Operation]:
        for name in names.split():
            _KNOWN[name] = frozenset(modifiers.split()), make
        return make

    return add


def operation(instruction: Instruction) -> Operation | None:
    """Return the operation of an instruction, or None for an instruction of another kind.

    Raises:
        PtxError: A form of it that is not known.
    """
    if instruction.name not in _KNOWN:
        return None
    known, make = _KNOWN[instruction.name]
    unknown = {m for m in instruction.modifiers if m not in known and m not in NUMPY and m not in ("f16x2", "bf16x2")}
    if unknown:
        raise PtxError(f"{instruction.text}: {', '.join(sorted(unknown))} is not known here")
    found = make(instruction)
    if "ftz" in instruction.modifiers:
        return Operation(found.sources, found.result, lambda *values: _flushed(found.function(*map(_flushed, values))))
    return found


def _flushed(value: Any) -> Any:
    """Replace numbers below the normal ones with a zero of their sign."""
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, np.copysign(value.dtype.type(0), value), value)


def _is_float(kind: str) -> bool:
    return NUMPY[kind].kind == "f"


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _same(kind: str, count: int, function: Callable[..., Any]) -> Operation:
    return Operation((kind,) * count, kind, function)


@_define("add sub", "rn ftz")
def _add(i: Instruction) -> Operation:
    return _same(i.kind, 2, np.add if i.name == "add" else np.subtract)


@_define("mul", "rn ftz lo hi wide")
def _mul(i: Instruction) -> Operation:
    if "wide" in i.modifiers:
        wide = NUMPY[_wider(i.kind)]
        return Operation((i.kind, i.kind), _wider(i.kind), lambda a, b: a.astype(wide) * b.astype(wide))
    if "hi" in i.modifiers:
        # Python's own integers where nothing is wide enough
        wide = NUMPY.get(_wider(i.kind), np.dtype(object))
        return _same(i.kind, 2, lambda a, b: (a.astype(wide) * b.astype(wide)) >> wide.type(8 * width(i.kind)))
    return _same(i.kind, 2, np.multiply)


@_define("mad", "lo wide")
def _mad(i: Instruction) -> Operation:
    if "wide" not in i.modifiers:
        return _same(i.kind, 3, lambda a, b, c: a * b + c)
    wide = NUMPY[_wider(i.kind)]
    sources = (i.kind, i.kind, _wider(i.kind))
    return Operation(sources, _wider(i.kind), lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@_define("fma", "rn ftz")
def _fma(i: Instruction) -> Operation:
    dtype = NUMPY[i.kind]

    def fma(a: Any, b: Any, c: Any) -> Any:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(dtype)

    return _same(i.kind, 3, fma)


def _remainder(a: Any, b: Any) -> Any:
    # a division by zero gives no exception and no defined number; the sign is the dividend's
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def _quotient(a: Any, b: Any) -> Any:
    return (a - _remainder(a, b)) // np.where(b == 0, b.dtype.type(1), b)


@_define("div", "rn ftz full approx")
def _div(i: Instruction) -> Operation:
    return _same(i.kind, 2, np.divide if _is_float(i.kind) else _quotient)


@_define("rem")
def _rem(i: Instruction) -> Operation:
    return _same(i.kind, 2, _remainder)


@_define("min max", "NaN ftz")
def _extreme(i: Instruction) -> Operation:
    # of a number and NaN the number, unless NaN is asked for
    if _is_float(i.kind) and "NaN" not in i.modifiers:
        return _same(i.kind, 2, np.fmin if i.name == "min" else np.fmax)
    return _same(i.kind, 2, np.minimum if i.name == "min" else np.maximum)


@_define("abs neg", "ftz")
def _sign(i: Instruction) -> Operation:
    return _same(i.kind, 1, np.abs if i.name == "abs" else np.negative)


@_define("sqrt ex2 lg2 rcp rsqrt", "rn ftz approx")
def _unary(i: Instruction) -> Operation:
    functions: dict[str, Callable] = {
        "sqrt": np.sqrt,
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": lambda a: a.dtype.type(1) / a,
        "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    }
    return _same(i.kind, 1, functions[i.name])


@_define("copysign")
def _copysign(i: Instruction) -> Operation:
    # the sign of the first, the rest of the second
    return _same(i.kind, 2, lambda sign, value: np.copysign(value, sign))


@_define("and or xor")
def _bitwise(i: Instruction) -> Operation:
    return _same(i.kind, 2, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.name])


@_define("not")
def _not(i: Instruction) -> Operation:
    return _same(i.kind, 1, np.bitwise_not)


@_define("shl shr")
def _shift(i: Instruction) -> Operation:
    bits = 8 * width(i.kind)

    def shift(a: Any, count: Any) -> Any:
        held = np.minimum(count, bits - 1).astype(a.dtype)
        if i.name == "shr" and i.kind[0] == "s":
            return a >> held
        moved = a << held if i.name == "shl" else a >> held
        return np.where(count >= bits, a.dtype.type(0), moved)

    return Operation((i.kind, "u32"), i.kind, shift)


@_define("bfe")
def _field(i: Instruction) -> Operation:
    """Extract bits from a place on; of a signed type the highest bit of the field is repeated above it."""
    bits = 8 * width(i.kind)
    wide = np.dtype(np.int64 if i.kind[0] == "s" else np.uint64)

    def field(a: Any, place: Any, length: Any) -> Any:
        place, length = (np.minimum(x & np.uint32(255), bits).astype(wide) for x in (place, length))
        moved = a.astype(wide) >> place
        if i.kind[0] == "u":
            return moved & ((wide.type(1) << length) - wide.type(1))
        above = wide.type(64) - np.maximum(length, 1)
        return np.where(length == 0, wide.type(0), (moved << above) >> above)

    return Operation((i.kind, "u32", "u32"), i.kind, field)


@_define("prmt")
def _permute(i: Instruction) -> Operation:
    """Select four bytes of eight; bit 3 of a choice repeats the byte's sign instead."""

    def permute(a: Any, b: Any, choice: Any) -> Any:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        out: Any = np.uint64(0)
        for place in range(4):
            chosen = (choice.astype(np.uint64) >> np.uint64(4 * place)) & np.uint64(15)
            byte = (both >> (chosen & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
            out = out | np.where(chosen >= 8, sign, byte) << np.uint64(8 * place)
        return out

    return Operation(("b32",) * 3, "b32", permute)


@_define("selp")
def _select(i: Instruction) -> Operation:
    return Operation((i.kind, i.kind, "pred"), i.kind, lambda a, b, p: np.where(p, a, b))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # a `u` after these is true for NaN too
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


@_define("setp", " ".join(_COMPARISONS))
def _compare(i: Instruction) -> Operation:
    return Operation((i.kind, i.kind), "pred", _COMPARISONS[i.modifiers[0]])


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@_define("cvt", "rn ftz " + " ".join(_TO_INTEGER))
def _convert(i: Instruction) -> Operation:
    to, source = i.modifiers[-2:]
    if to in ("f16x2", "bf16x2"):
        half = to[:-2]

        def pack(high: Any, low: Any) -> Any:
            return encode(high, half).astype(np.uint32) << np.uint32(16) | encode(low, half)

        return Operation((source, source), "b32", pack)
    whole = next((_TO_INTEGER[m] for m in i.modifiers if m in _TO_INTEGER), None)
    if not _is_float(source) or _is_float(to):
        # of wider integers the low bytes
        return Operation((source,), to, lambda a: (whole(a) if whole else a).astype(NUMPY[to]))
    if whole is None:
        raise PtxError(f"{i.text}: expected a rounding to integers")
    least, most = (NUMPY[to].type(x) for x in (np.iinfo(NUMPY[to]).min, np.iinfo(NUMPY[to]).max))

    def to_integer(a: Any) -> Any:
        # what lies outside becomes the nearest, and NaN zero
        exact = whole(a.astype(np.float64))
        inside = (exact > least) & (exact < most)
        held = np.where(inside, exact, 0).astype(NUMPY[to])
        return np.where(inside | np.isnan(exact), held, np.where(exact < 0, least, most))

    return Operation((source,), to, to_integer)
