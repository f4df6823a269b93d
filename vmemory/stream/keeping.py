"""The half of a session that keeps what it has: saved, resumed, erased."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vmemory.banks import BankFileError, load
from vmemory.stream.opening import Opening
from vmemory.stream.watching import Watching

_Self = TypeVar("_Self", bound="Keeping")


class Keeping(Watching):
    """A stream that can be put down and taken up again; see `VideoSession`."""

    def reset(self) -> None:
        """Forget the stream; the memory's size and the frame size stay."""
        if self.memory is not None:
            self.memory.reset()
        self._opening.reset()
        self._waiting, self._frames, self._last, self._prefix = [], 0, -math.inf, None
        self._pushes += 1

    def erase(self, t0: float, t1: float, **how: Any) -> int:
        """Forget the frames from `t0` to `t1` seconds: memory, archive, the prompt's cache and a waiting frame.

        Where two frames become one of the memory, it goes if either of them is in the span (of ready inputs, two that
        follow each other by `fps`).

        Args:
            t0, t1: Seconds, both included.
            how: Of the memory's own `erase`, which says what else has to go.

        Returns:
            Entries removed from the memory.

        Raises:
            ValueError: `t0` above `t1`, or a setting the memory's `erase` does not have; nothing has changed then.
            RuntimeError: The archive's disk does not take its part; see `Bank.erase`.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        # an entry has one time, and its frames lie up to a step around it
        behind = self.adapter.frame_time(0.0, self._step)
        span = t0 - (self._step - behind), t1 + behind
        try:
            removed = 0 if self.memory is None else int(self.memory.erase(*span, **how))
        except RuntimeError:
            # of the memory's disk; what is held here goes all the same
            self._forget(span, t0, t1)
            raise
        self._forget(span, t0, t1)
        return removed

    def _forget(self, span: tuple[float, float], t0: float, t1: float) -> None:
        if self._opening.bank is not None:
            self._opening.bank.erase(*span)
        self._waiting = [(frame, t) for frame, t in self._waiting if not t0 <= t <= t1]
        self._prefix = None

    def save(self, path: str | Path) -> None:
        """Write the memory to a `.vmem` file, with all that `load` needs to go on; a frame waiting for its pair too.

        Raises:
            ValueError: Nothing has been pushed.
        """
        if self.memory is None or self._grid is None:
            raise ValueError("session: expected frames before saving, got none")
        extra, opening = self._opening.saved()
        if self._tail is not None:
            extra["tail"] = self._tail
        if self._waiting:
            extra["waiting"] = torch.stack([frame for frame, _ in self._waiting])
        notes = {
            "frames": self._frames, "last": self._last, "fps": self.fps, "frame_size": self.frame_size,
            "grid": self._grid, "time_origin": self.time_origin, "waiting": [t for _, t in self._waiting],
            "step": self._step, "opening": opening,
        }  # fmt: skip
        self.memory.save(path, extra, {"session": notes})

    @classmethod
    def load(cls: type[_Self], path: str | Path, model: nn.Module, processor: Any = None, **settings: Any) -> _Self:
        """The session that `save` wrote, over the same model. One blank frame goes through the tower.

        Args:
            path: Where it was written.
            model, processor: As at the start.
            settings: Further arguments of `VideoSession`; rate, frame size and origin of time are those saved.

        Raises:
            BankFileError: The file cannot be used, or holds no session.
        """
        session = cls(model, processor, **settings)
        session.resume(path)
        return session

    def resume(self, path: str | Path) -> None:
        """Go on from where `save` wrote; what this session held is forgotten.

        Raises:
            BankFileError: As in `load`; nothing has changed then.
        """
        memory, file = load(path, next(self.model.parameters()).device)
        if "session" not in file.notes:
            raise BankFileError(f"{path}: holds a memory without a session")
        notes = file.notes["session"]
        waiting = list(zip(file.extra["waiting"], notes["waiting"], strict=True)) if notes["waiting"] else []
        grid, size = (notes["grid"][0], notes["grid"][1]), notes["frame_size"]
        output = self._blank(grid, size and tuple(size))
        opening = Opening.resumed(file.extra, notes["opening"], next(self.model.parameters()).device)
        self.memory, self._grid, self._output, self._waiting = memory, grid, output, waiting
        self._frames, self._last, self._tail = notes["frames"], notes["last"], file.extra.get("tail")
        self.fps, self.time_origin, self.frame_size = notes["fps"], notes["time_origin"], size and tuple(size)
        self._prefix, self._pushes = None, self._pushes + 1
        self._step, self._opening = notes["step"], opening

    @torch.no_grad()
    def _blank(self, grid: tuple[int, int], size: tuple[int, int] | None) -> Any:
        """The tower's output for a blank frame, which prompts imitate."""
        size = size or self.adapter.size_of(self.model, grid)
        frames = torch.zeros(self.adapter.frames_together(self.model), 3, *size, dtype=torch.uint8)
        inputs = self.adapter.prepare(self.model, frames, self.processor, size)
        return self.adapter.encode(self.model, self._moved(inputs)).output
