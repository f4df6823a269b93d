"""Keep the frames of a short stream uncompressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vmemory.banks import Memory, RecentBank
from vmemory.banks.loading import restored
from vmemory.banks.state import MOST_FRAMES
from vmemory.session.checkpoint import integer

_STATE = "short_stream."


class ShortStream:
    """The frames of a stream as long as there are at most `frames` of them; afterwards empty.

    A session uses these frames instead of its memory, so that a short stream is not compressed.

    Args:
        frames: Largest number of frames of a short stream.
    """

    def __init__(self, frames: int) -> None:
        self.frames, self.seen = frames, 0
        self.bank: Memory | None = None

    def push(self, frames: Tensor, times: Tensor, mask: Tensor | None) -> None:
        """Push frames `[T, H, W, C]`, as into a memory."""
        self.seen += len(frames)
        if self.seen > self.frames:
            self.bank = None
        elif self.seen:
            if self.bank is None:
                _, H, W, C = frames.shape
                self.bank = RecentBank(C, (H, W), self.frames, device=frames.device, dtype=frames.dtype)
            self.bank.push(frames, times, mask=mask)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Undo all pushes at the end of the context."""
        seen, bank = self.seen, self.bank
        with nullcontext() if bank is None else bank.preserved():
            try:
                yield
            finally:
                self.seen, self.bank = seen, bank

    def erase(self, t0: float, t1: float) -> None:
        """Forget the frames from `t0` to `t1` seconds."""
        if self.bank is not None:
            self.bank.erase(t0, t1)

    def reset(self) -> None:
        """Begin a new stream."""
        self.seen, self.bank = 0, None

    @property
    def nbytes(self) -> int:
        return 0 if self.bank is None else self.bank.nbytes

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return copies of tensors and plain values for `resumed`."""
        notes = {"frames": self.frames, "seen": self.seen}
        if self.bank is None:
            return {}, notes
        file = self.bank.to_file()
        return {_STATE + name: x for name, x in file.state.items()}, {**notes, "bank": file.config}

    @classmethod
    def resumed(cls, extra: dict[str, Tensor], notes: dict[str, Any], device: torch.device) -> ShortStream:
        """Restore a short stream from the result of `saved`.

        Raises:
            ValueError: `saved` cannot have returned these values.
        """
        if not {"frames", "seen"} <= notes.keys() <= {"frames", "seen", "bank"}:
            raise ValueError(f"short_stream: expected frames, seen and perhaps bank, got {', '.join(notes)}")
        short = cls(integer("short_stream.frames", notes["frames"], MOST_FRAMES))
        short.seen = integer("short_stream.seen", notes["seen"], MOST_FRAMES)
        if ("bank" in notes) != (0 < short.seen <= short.frames):
            raise ValueError(f"short_stream: expected frames while at most {short.frames} were seen, got {short.seen}")
        if "bank" not in notes:
            return short
        config = notes["bank"]
        if not isinstance(config, dict) or config.get("capacity") != short.frames or config.get("streams") != 1:
            raise ValueError(f"short_stream: expected a memory of one stream and {short.frames} frames, got another")
        state = {name.removeprefix(_STATE): x for name, x in extra.items() if name.startswith(_STATE)}
        short.bank = restored(RecentBank.policy, config, state, device)
        if short.bank.counts()["seen"] != short.seen:
            raise ValueError(f"short_stream: expected a memory that has seen {short.seen} frames, got another")
        return short
