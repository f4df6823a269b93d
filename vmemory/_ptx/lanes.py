"""The lanes of a launch: their registers and the memory they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vmemory._ptx.memory import GlobalMemory, SharedMemory
from vmemory._ptx.program import Address, Program, PtxError
from vmemory._ptx.values import NUMPY, decode, encode, immediate, resized, unsigned, width

__all__ = ["WARP", "Lanes"]

WARP = 32


class Lanes:
    """Every register is an array over all lanes of all programs, or one number where all lanes hold the same.

    Args:
        program: The kernel.
        grid: Programs in x, y and z.
        threads: Lanes of a program, a multiple of 32.
        shared: Bytes of shared memory of a program.
        arguments: A number per parameter of the kernel; pointers as addresses.
        tensors: What the kernel may touch.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: Sequence[int | float],
        tensors: Iterable[Tensor],
    ) -> None:
        self.program, self.threads = program, threads
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        programs = grid[0] * grid[1] * grid[2]
        self.count = programs * threads
        thread = np.arange(self.count)
        self.owner = thread // threads
        self.lane = (thread % WARP).astype(np.uint32)
        self.memory: dict[str, GlobalMemory | SharedMemory]
        self.memory = {"global": GlobalMemory(tensors), "shared": SharedMemory(programs, shared)}
        self.registers: dict[str, Any] = {"%laneid": self.lane, "global_smem": np.uint32(0)}
        places = self.owner % grid[0], self.owner // grid[0] % grid[1], self.owner // (grid[0] * grid[1])
        within = thread % threads, np.zeros(1), np.zeros(1)
        for axis, place, size, own, most in zip("xyz", places, grid, within, (threads, 1, 1), strict=True):
            special = {"ctaid": place, "nctaid": np.array(size), "tid": own, "ntid": np.array(most)}
            self.registers |= {f"%{name}.{axis}": value.astype(np.uint32) for name, value in special.items()}

    def read(self, name: Any, kind: str) -> Any:
        """Return the value of a register or an immediate: [count], or one for all lanes."""
        held = self.registers.get(name)
        if held is None:
            if name not in self.program.registers:
                return immediate(name, kind)
            held = self.nothing(name)
        return decode(held, kind)

    def nothing(self, name: str) -> Any:
        """Return all ones, NaN as a float: what a register holds that was never written."""
        kind = self.program.registers[name]
        return np.True_ if kind == "pred" else ~unsigned(width(kind)).type(0)

    def each(self, name: Any, kind: str) -> Any:
        """Return the value of a register or an immediate for each lane: [count]."""
        return np.broadcast_to(self.read(name, kind), self.count)

    def write(self, name: Any, value: Any, kind: str, active: Any = None) -> None:
        """Write in the lanes `active`, in all where it is None."""
        if name == "_":
            return
        held = self.program.registers[name]
        if held == "pred":
            bits = value
        elif kind[0] == "s":
            # a wider register repeats the sign
            value = value.astype(NUMPY[kind]).astype(f"i{width(held)}")
            bits = value.view(unsigned(width(held)))
        else:
            bits = resized(encode(value, kind), width(held))
        if active is not None:
            bits = np.where(active, bits, self.registers[name] if name in self.registers else self.nothing(name))
        self.registers[name] = bits

    def argument(self, name: str) -> Any:
        """Return a parameter's bits."""
        value, kind = self.arguments[name], self.program.parameters[name]
        if NUMPY[kind].kind == "f":
            return encode(NUMPY[kind].type(value), kind)
        return unsigned(width(kind)).type(int(value) % (1 << 8 * width(kind)))

    def addresses(self, address: Address) -> Any:
        """Return the address that an operand means in each lane: [count]."""
        base = self.registers.get(address.base)
        if base is None:
            raise PtxError(f"{address.base}: expected a register that was written")
        return np.broadcast_to(base.astype(np.int64) + address.offset, self.count)

    def load(self, space: str, addresses: Any, element: int, count: int, active: Any) -> Any:
        """Load `count` adjacent numbers of `element` bytes for each lane: [lanes, count], zero where not active."""
        lanes = slice(None) if active is None else active
        rows = self.memory[space].load(addresses[lanes], element * count, self.owner[lanes])
        out = np.zeros((self.count, count), unsigned(element))
        out[lanes] = np.ascontiguousarray(rows).view(unsigned(element))
        return out

    def store(self, space: str, addresses: Any, values: Any, active: Any) -> None:
        """Store adjacent numbers, `values` [lanes, n]."""
        lanes = slice(None) if active is None else active
        size = values.dtype.itemsize * values.shape[1]
        rows = np.ascontiguousarray(values[lanes]).view(unsigned(min(size, 8)))
        self.memory[space].store(addresses[lanes], rows, size, self.owner[lanes])
