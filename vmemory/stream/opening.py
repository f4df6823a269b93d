"""The beginning of a stream, which is shown whole for as long as it is all there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.banks import RingBank
from vmemory.banks.quantized import dtype_of

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

    def reset(self) -> None:
        """A new stream."""
        self.seen, self.bank = 0, None

    @property
    def nbytes(self) -> int:
        return 0 if self.bank is None else self.bank.nbytes

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values for `resumed`."""
        notes = {"frames": self.frames, "seen": self.seen}
        if self.bank is None:
            return {}, notes
        return {_STATE + name: x for name, x in self.bank.state._asdict().items()}, {
            **notes,
            "bank": self.bank.config(),
        }

    @classmethod
    def resumed(cls, extra: dict[str, Tensor], notes: dict[str, Any], device: torch.device) -> Opening:
        """The one that `saved` tells of."""
        opening = cls(notes["frames"])
        opening.seen = notes["seen"]
        if "bank" in notes:
            config = {**notes["bank"], "dtype": dtype_of(notes["bank"]["dtype"])}
            bank = opening.bank = RingBank(**config, device=device)
            bank.restore(type(bank.state)(**{name: extra[_STATE + name].to(device) for name in bank.state._fields}))
        return opening
