"""The half of a session that keeps what it has: saved, resumed, erased."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmemory.banks import BankFile, BankFileError, load
from vmemory.banks.lock import locked
from vmemory.models.adapter import Clip, device_of
from vmemory.session.checkpoint import SessionNotes, frame_size
from vmemory.session.short_stream import Opening
from vmemory.session.watching import Watching

_Self = TypeVar("_Self", bound="Keeping")


class Keeping(Watching):
    """A stream that can be put down and taken up again; see `VideoSession`."""

    @locked
    def reset(self) -> None:
        """Forget the stream, where a pool keeps it on disk too; the memory's size and the frame size stay."""
        self._check_here()
        # first what can fail
        if self._home is not None:
            self._home.unlink(missing_ok=True)
        if self.memory is not None:
            self.memory.reset()
        self._opening.reset()
        self._waiting, self._frames, self._last, self._prefix = [], 0, -math.inf, None
        self._pair = self._start = None
        self._pushes += 1

    @locked
    def erase(self, t0: float, t1: float, **how: Any) -> int:
        """Forget the frames from `t0` to `t1` seconds: memory, archive, the prompt's cache and a waiting frame.

        Where a pool keeps the session on disk, its file is written anew; other files that `save` wrote are not touched.

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
            OSError: The pool's disk does not take its part; the session's file there is gone then.
        """
        self._check_here()
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
        # an answer that is being prepared must not keep what it had
        self._pushes += 1
        self._prefix = self._pair = None
        if self._home is not None and self._home.exists():
            try:
                self.save(self._home)
            except BaseException:
                self._home.unlink(missing_ok=True)
                raise

    def save(self, path: str | Path) -> None:
        """Write the memory to a `.vmem` file, with all that `load` needs to go on; a frame waiting for its pair too.

        What is written is the session of one moment; other threads may push while the disk takes it.

        Raises:
            OSError: The disk does not take it; an old file is still there.
            ValueError: Nothing has been pushed.
        """
        self._to_file().write(Path(path))

    @locked
    def _to_file(self) -> BankFile:
        self._check_here()
        if self.memory is None or self._grid is None:
            raise ValueError("session: expected frames before saving, got none")
        extra, opening = self._opening.saved()
        if self._tail is not None:
            extra["tail"] = self._tail.clone()
        if self._waiting:
            extra["waiting"] = torch.stack([frame for frame, _ in self._waiting])
        notes = SessionNotes(
            self._frames, self._last, self.fps, self.frame_size, self._grid, self.time_origin,
            tuple(t for _, t in self._waiting), self._step, opening, self._start,
            self._kind,
        )  # fmt: skip
        file: BankFile = self.memory.to_file(extra, {"session": notes._asdict()})
        return file

    def kept_at(self, path: Path) -> None:
        """What a pool says: where it keeps this session, so that what is erased is erased there too."""
        self._home = path

    @locked
    def leave(self, why: str, *, keep: bool) -> None:
        """What a pool says when it lets go of a session: it is written, or not kept, and takes no more frames.

        Raises:
            OSError: The disk does not take it; it goes on then.
        """
        if keep and self._home is not None:
            self.save(self._home)
        self._left, self._home = why, None

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
        device = device_of(self.model)
        memory, file = load(path, device)
        if "session" not in file.notes:
            raise BankFileError(f"{path}: holds a memory without a session")
        try:
            notes = SessionNotes.of(file.notes["session"])
            if notes.model_type != self._kind:
                raise ValueError(f"holds what a model of type {notes.model_type!r} saw, got one of type {self._kind!r}")
            waiting = notes.frames_waiting(file.extra, self.adapter.frames_together(self.model))
            opening = Opening.resumed(file.extra, notes.opening, device)
            output = self._checked(notes, memory, opening, file.extra)
        except ValueError as error:
            raise BankFileError(f"{path}: {error}") from None
        with self._lock:
            self._check_here()
            self.memory, self._grid, self._output, self._waiting = memory, notes.grid, output, waiting
            self._frames, self._last, self._tail = notes.frames, notes.last, file.extra.get("tail")
            self.fps, self.time_origin, self.frame_size = notes.fps, notes.time_origin, notes.frame_size
            self._prefix, self._pushes = None, self._pushes + 1
            self._step, self._opening = notes.step, opening
            self._start, self._pair = notes.start, None

    @property
    def _kind(self) -> str:
        return str(self.model.config.model_type)

    def _checked(self, notes: SessionNotes, memory: Any, opening: Opening, extra: dict[str, Tensor]) -> Any:
        """The tower's output for a blank frame, whose tokens are those that a session's parts are made for.

        Raises:
            ValueError: They are made for others.
        """
        (H, W), D = _token_shape(memory)
        if memory.streams != 1 or notes.grid != (H, W):
            raise ValueError(f"session.grid: expected a memory of one stream and {notes.grid} tokens, got {(H, W)}")
        size = frame_size(notes.frame_size or self.adapter.size_of(self.model, notes.grid))
        try:
            clip, output = self._blank(size)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"frame_size: {size} pixels do not go through this model ({error})") from error
        if tuple(clip.frames.shape[1:]) != (H, W, D):
            raise ValueError(f"session: expected tokens {list(clip.frames.shape[1:])} of this model, got {[H, W, D]}")
        if opening.bank is not None and _token_shape(opening.bank) != ((H, W), D):
            raise ValueError(f"opening: expected tokens {[H, W, D]}, got {list(_token_shape(opening.bank))}")
        want, got = (None if x is None else list(x.shape) for x in (clip.tail, extra.get("tail")))
        if want != got:
            raise ValueError(f"tail: expected {want}, got {got}")
        return output

    @torch.no_grad()
    def _blank(self, size: tuple[int, int]) -> tuple[Clip, Any]:
        """A blank frame's tokens, and the tower's output for it, which prompts imitate."""
        frames = torch.zeros(self.adapter.frames_together(self.model), 3, *size, dtype=torch.uint8)
        inputs = self.adapter.prepare(self.model, frames, self.processor, size)
        clips, output = self.adapter.encode(self.model, self._moved(inputs))
        return clips[0], output


def _token_shape(memory: Any) -> tuple[tuple[int, int], int]:
    """Token grid (H, W) of the frames that a memory takes, and their channels."""
    config = memory.config()
    return tuple(config["grid"]), config["dim"]
