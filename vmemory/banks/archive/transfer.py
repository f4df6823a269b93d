"""Copy an outbox to the host during pushes, for the thread that stores it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.banks.archive.outbox import Outbox
from vmemory.banks.lock import MemoryLock


class Transfer:
    """A buffer on the host as large as an outbox, from which the thread of a store reads one batch at a time.

    A batch is copied into the buffer; on a CUDA device by a CUDA stream of its own into pinned memory. Then the thread
    reads it. The next batch waits in the outbox until both are done. Only `settle` makes the host wait for the device:
    the next `step` asks whether a copy has arrived.

    Attributes:
        frames: The outbox's `frames()` on the host, `[n, ...]` each.
        lock: Held while a batch moves, and by pushes while they fill the outbox.
    """

    def __init__(self, box: Outbox, store: Any) -> None:
        self.box, self._store = box, store
        cuda = box.device.type == "cuda"
        self.frames = tuple(torch.zeros((box.room, *t.shape[1:]), dtype=t.dtype, pin_memory=cuda) for t in box.frames())
        self._count = torch.zeros_like(box.count, device="cpu", pin_memory=cuda)
        parts, facts = self.frames[:-2], self.frames[-2:]
        store.stage([*(t.view(torch.uint8).numpy() for t in parts), *(t.numpy() for t in facts)], parts[0].shape[1])
        self._side = torch.cuda.Stream(box.device) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None
        self._on_its_way = False
        self.lock = MemoryLock()

    def arrived(self) -> bool:
        """Pass an arrived batch to the thread without waiting, and return whether the buffer is free."""
        with self.lock:
            if self._on_its_way:
                if self._copied is not None and not self._copied.query():
                    return False
                filled = int(self._count[0])
                if filled:
                    self._store.put(filled)
                # last, because an interrupt before it stores a batch twice, and in another order would lose it
                self._on_its_way = False
            return not self._store.busy()

    def step(self) -> bool:
        """Copy the outbox unless a batch is still on its way, and return whether the outbox is empty now."""
        with self.lock:
            if not self.arrived():
                return False
            if self._side is None or self._copied is None:
                self._copy(int(self.box.count[0]), non_blocking=False)
            else:
                pushes = torch.cuda.current_stream(self.box.device)
                # the copy begins when the pushes so far have written, and the next ones write when it has read
                self._side.wait_stream(pushes)
                with torch.cuda.stream(self._side):
                    self._copy(self.box.room, non_blocking=True)
                    self._copied.record(self._side)
                pushes.wait_event(self._copied)
            self._on_its_way = True
            self.box.release()
            if self._side is None:
                self.arrived()
            return True

    def _copy(self, filled: int, non_blocking: bool) -> None:
        for here, there in zip((*self.frames, self._count), (*self.box.frames(), self.box.count), strict=True):
            n = 2 if there is self.box.count else filled
            here[:n].copy_(there[:n], non_blocking=non_blocking)
            if self._side is not None:
                # the memory of an outbox that is deleted meanwhile stays until the copy has read it
                there.record_stream(self._side)

    def settle(self) -> None:
        """Wait until the store has all frames of the outbox; synchronises the host."""
        with self.lock:
            self._wait()
            self.step()
            self._wait()

    def _wait(self) -> None:
        if self._on_its_way and self._copied is not None:
            self._copied.synchronize()
        self.arrived()
        self._store.wait()

    def put(self, frames: list[tuple[Tensor, ...]]) -> None:
        """Write frames that do not come from the outbox, each as a row of `frames`, some of them shorter."""
        with self.lock:
            self.settle()
            for first in range(0, len(frames), self.box.room):
                batch = frames[first : first + self.box.room]
                for i, frame in enumerate(batch):
                    for here, new in zip(self.frames, frame, strict=True):
                        here[i, : new.shape[0]] = new
                self._store.put(len(batch))
                self._store.wait()

    def clear(self) -> None:
        """Fill the outbox and the buffer with zeros; call `settle` first."""
        with self.lock:
            self.box.clear()
            for t in self.frames:
                t.zero_()
