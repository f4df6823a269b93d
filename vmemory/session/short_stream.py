"""The beginning of a stream, which is shown whole for as long as it is all there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vmemory.banks import RingBank
from vmemory.banks.checks import MOST
from vmemory.banks.loading import restored
from vmemory.session.checkpoint import integer

_STATE = "opening."


class Opening:
    """The frames of a stream that is still short, untouched; afterwards nothing.

    Args:
        frames: Up to how many a stream is short.
    """

    def __init__(self, frames: int) -> None:
        self.frames, self.seen = frames, 0
        self.bank: RingBank | None = None

    def push(self, frames: Tensor, times: Tensor, valid: Tensor | None) -> None:
        """Frames `[T, H, W, C]` as a memory takes them."""
        self.seen += len(frames)
        if self.seen > self.frames:
            self.bank = None
        elif self.seen:
            if self.bank is None:
                _, H, W, C = frames.shape
                self.bank = RingBank(C, (H, W), self.frames, device=frames.device, dtype=frames.dtype)
            self.bank.push(frames, times, valid=valid)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Pushes within the block leave no trace."""
        seen, bank = self.seen, self.bank
        with nullcontext() if bank is None else bank.preserved():
            try:
                yield
            finally:
                self.seen, self.bank = seen, bank

    def reset(self) -> None:
        """A new stream."""
        self.seen, self.bank = 0, None

    @property
    def nbytes(self) -> int:
        return 0 if self.bank is None else self.bank.nbytes

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, copied, and plain values for `resumed`."""
        notes = {"frames": self.frames, "seen": self.seen}
        if self.bank is None:
            return {}, notes
        file = self.bank.to_file()
        return {_STATE + name: x for name, x in file.state.items()}, {**notes, "bank": file.config}

    @classmethod
    def resumed(cls, extra: dict[str, Tensor], notes: dict[str, Any], device: torch.device) -> Opening:
        """The one that `saved` tells of.

        Raises:
            ValueError: They are not what `saved` gives.
        """
        if not {"frames", "seen"} <= notes.keys() <= {"frames", "seen", "bank"}:
            raise ValueError(f"opening: expected frames, seen and perhaps bank, got {', '.join(notes)}")
        opening = cls(integer("opening.frames", notes["frames"], MOST))
        opening.seen = integer("opening.seen", notes["seen"], MOST)
        # as long as a stream is short, and only then, its frames are here
        if ("bank" in notes) != (0 < opening.seen <= opening.frames):
            raise ValueError(f"opening: expected frames while at most {opening.frames} were seen, got {opening.seen}")
        if "bank" not in notes:
            return opening
        config = notes["bank"]
        if not isinstance(config, dict) or config.get("capacity") != opening.frames or config.get("streams") != 1:
            raise ValueError(f"opening: expected a memory of one stream and {opening.frames} frames, got another")
        state = {name.removeprefix(_STATE): x for name, x in extra.items() if name.startswith(_STATE)}
        opening.bank = restored(RingBank.policy, config, state, device)
        if opening.bank.counts()["seen"] != opening.seen:
            raise ValueError(f"opening: expected a memory that has seen {opening.seen} frames, got another")
        return opening
