"""Runs a kernel's instructions, all lanes of a launch together.

Lanes at the lowest instruction go first, so that they meet again behind a branch. At an instruction of whole warps
(`shfl`, `mma`) lanes wait for their warp, at a barrier for their program. This is lock step: it shows wrong values and
wrong addresses, and no fault within a program that needs an unlucky order of its warps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vmemory._ptx.arithmetic import operation
from vmemory._ptx.instructions import INSTRUCTIONS, is_barrier, is_warp_wide
from vmemory._ptx.lanes import WARP, Lanes
from vmemory._ptx.program import PtxError, parse

__all__ = ["Kernel"]


class Kernel:
    """A kernel that can be launched.

    Args:
        text: PTX for sm_80 with one kernel.

    Raises:
        PtxError: It holds an instruction that is not known here.
    """

    def __init__(self, text: str) -> None:
        self.program = parse(text)
        self.operations = [operation(i) for i in self.program.instructions]
        for i, known in zip(self.program.instructions, self.operations, strict=True):
            if known is None and i.name not in INSTRUCTIONS and i.name not in ("bra", "ret", "exit"):
                raise PtxError(f"{i.text}: not known here")
            of_some = i.guard is not None or (is_barrier(i) and i.operands != ("0",))
            if of_some and (is_barrier(i) or is_warp_wide(i)):
                raise PtxError(f"{i.text}: expected all lanes to meet here")
            if i.name == "atom" and self._is_read(str(i.operands[0])):
                raise PtxError(f"{i.text}: the old value is not known here")

    def _is_read(self, register: str) -> bool:
        return sum(bool(re.search(rf"{register}\b", i.text)) for i in self.program.instructions) > 1

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: Sequence[int | float],
        tensors: Iterable[Tensor],
    ) -> None:
        """Run the kernel to its end.

        Args:
            grid: Programs in x, y and z.
            threads: Lanes of a program, a multiple of 32.
            shared: Bytes of shared memory of a program.
            arguments: A number per parameter of the kernel; pointers as addresses.
            tensors: CPU tensors that the kernel may touch.

        Raises:
            PtxError: An access is outside of tensors or shared memory, misaligned, or at a place that another program
                wrote; lanes wait for others that never come.
        """
        _Run(self, Lanes(self.program, grid, threads, shared, arguments, tensors)).to_the_end()


class _Run:
    def __init__(self, kernel: Kernel, lanes: Lanes) -> None:
        self.kernel, self.lanes = kernel, lanes
        # lanes by the instruction that they are at: those that can go on, that wait for their warp, for their program
        self.ready = {0: np.ones(lanes.count, bool)}
        self.at_warp: dict[int, Any] = {}
        self.at_barrier: dict[int, Any] = {}
        self.ended = np.zeros(lanes.count, bool)

    def to_the_end(self) -> None:
        with np.errstate(all="ignore"):
            while self.ready:
                at = min(self.ready)
                self.follow(at, self.ready.pop(at))
        waiting = sorted({*self.at_warp, *self.at_barrier})
        if waiting:
            texts = "; ".join(self.kernel.program.instructions[at].text for at in waiting)
            raise PtxError(f"{self.kernel.program.name}: lanes wait for others that never come, at {texts}")

    def follow(self, at: int, lanes: Any) -> None:
        """Run `lanes` until they part or wait."""
        program, whole = self.kernel.program, bool(lanes.all())
        while True:
            i = program.instructions[at]
            guarded = None
            if i.guard is not None:
                guarded = self.lanes.read(i.guard, "pred") ^ i.guard_negated
            if i.name in ("bra", "ret", "exit"):
                going = lanes if guarded is None else lanes & guarded
                if i.name == "bra":
                    self.join(program.labels[str(i.operands[0])], going)
                else:
                    self.ended |= going
                    self.release()
                self.join(at + 1, lanes & ~going)
                return
            if is_barrier(i):
                self.at_barrier[at] = lanes | self.at_barrier.get(at, False)
                self.release()
                return
            if is_warp_wide(i):
                lanes = self.gathered(at, lanes)
                if not lanes.any():
                    return
                whole = bool(lanes.all())
            active = None if whole else lanes
            if guarded is not None:
                active = lanes & guarded
            if active is None or active.any():
                self.step(at, active)
            at += 1
            if at in self.ready:
                lanes = lanes | self.ready.pop(at)
                whole = bool(lanes.all())

    def step(self, at: int, active: Any) -> None:
        i, known = self.kernel.program.instructions[at], self.kernel.operations[at]
        try:
            if known is None:
                INSTRUCTIONS[i.name](self.lanes, i, active)
            else:
                pairs = zip(i.operands[1:], known.sources, strict=True)
                value = known.function(*(self.lanes.read(name, kind) for name, kind in pairs))
                self.lanes.write(i.operands[0], value, known.result, active)
        except PtxError as error:
            raise PtxError(f"{self.kernel.program.name}: {i.text}: {error}") from None

    def join(self, at: int, lanes: Any) -> None:
        if lanes.any():
            self.ready[at] = lanes | self.ready[at] if at in self.ready else lanes

    def gathered(self, at: int, lanes: Any) -> Any:
        """Return the lanes whose whole warp is at an instruction; let the others wait there."""
        lanes = lanes | self.at_warp.pop(at, False)
        complete = np.repeat(lanes.reshape(-1, WARP).all(1), WARP)
        if (lanes & ~complete).any():
            self.at_warp[at] = lanes & ~complete
        return complete

    def release(self) -> None:
        """Continue with all lanes of a program once each is at a barrier, whichever it is, or has ended."""
        waiting = np.any(list(self.at_barrier.values()), axis=0) if self.at_barrier else self.ended
        complete = (waiting | self.ended).reshape(-1, self.lanes.threads).all(1)
        going = np.repeat(complete, self.lanes.threads)
        for at, lanes in list(self.at_barrier.items()):
            self.join(at + 1, lanes & going)
            self.at_barrier[at] = lanes & ~going
            if not self.at_barrier[at].any():
                del self.at_barrier[at]
