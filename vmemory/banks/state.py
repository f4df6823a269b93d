"""The state of a bank, and what keeps and restores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmemory.banks.archive import Archive
from vmemory.banks.checks import check_state
from vmemory.banks.files import BankFile
from vmemory.banks.lock import MemoryLock, locked
from vmemory.banks.quantized import name_of
from vmemory.banks.streams import as_streams
from vmemory.banks.tokens import MemoryTokens, row_tables
from vmemory.ops._checks import check_int, shape_of
from vmemory.ops.bank import layout_maps
from vmemory.reference.bank_layout import RULES, SEEN, BankLayout, BankState

# buffers that keep their dtype when a model around them is cast, and those that operators want as wide as the tokens
_KEPT, _WIDE = ("mass", "clock", "scale"), ("descriptor", "norm", "link", "maps")
_Self = TypeVar("_Self", bound="StateModule")


class StateModule(nn.Module):
    """What every bank can do with its state, whatever its policy."""

    # the state, registered as buffers
    slots: Tensor
    mass: Tensor
    descriptor: Tensor
    norm: Tensor
    link: Tensor
    entry: Tensor
    clock: Tensor
    order: Tensor
    counter: Tensor
    scale: Tensor
    maps: Tensor

    layout: BankLayout
    levels: tuple[int, ...]
    streams: int
    adapter: nn.Module | None
    # the constructor's arguments as plain values, set by subclasses
    _config: dict[str, Any]
    _archive: Archive | None = None
    # held by every call that reads or changes the state
    _lock: MemoryLock

    # what saving needs beside the layout; subclasses name themselves in vmemory.banks.POLICIES
    policy = "bank"

    @property
    def state(self) -> BankState:
        """The state tensors themselves, not copies."""
        # attributes of modules are looked up slowly, and every push asks for ten
        held = self._buffers
        return BankState(*[held[name] for name in BankState._fields])  # type: ignore[arg-type]

    @property
    def quantized(self) -> bool:
        """Whether tokens are stored in 8 or 4 bits."""
        return not self.slots.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: constant from construction to the end."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    @property
    def capacity(self) -> int:
        """Entries one stream can hold."""
        return self.layout.slots

    @property
    def compares(self) -> bool:
        """Whether what frames show decides which frames are held; else their numbers alone do."""
        return RULES[self.layout.rule].choose in ("adjacent", "all")

    @property
    def archive(self) -> Archive | None:
        """Where what leaves goes; None = nowhere. Set it, once, after the bank has got its device and dtype."""
        return self._archive

    @archive.setter
    @locked
    def archive(self, archive: Archive | None) -> None:
        if archive is not None:
            if not isinstance(archive, Archive):
                raise TypeError(f"archive: expected an Archive or None, got {type(archive).__name__}")
            archive.attach(self.layout, self.levels, self.state)
        self._archive = archive

    def recall(self, t0: float, t1: float, stream: int = 0) -> MemoryTokens:
        """What the archive holds of `t0` to `t1` seconds, both inclusive; see `Archive.recall`.

        Raises:
            ValueError: `t0` above `t1` or NaN, no such stream, or a bank without an archive.
        """
        check_int("stream", stream, low=0, high=self.streams - 1)
        if self._archive is None:
            raise ValueError("archive: expected a bank with an archive, got one without")
        return self._archive.recall(t0, t1, stream)

    @locked
    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        if self._archive is not None:
            self._archive.check_dtype(fn(self.slots.new_empty(0)).dtype)
        kept = {name: getattr(self, name) for name in _KEPT + _WIDE if hasattr(self, name)}
        super()._apply(fn, recurse)
        wide = torch.promote_types(self.slots.dtype, torch.float32)
        for name, old in kept.items():
            new, kind = getattr(self, name), wide if name in _WIDE else old.dtype
            if new.dtype != kind:
                setattr(self, name, old.to(new.device, kind))
        if self.maps.dtype != kept["maps"].dtype:
            self.maps = layout_maps(self.layout, self.slots)
        if self._archive is not None:
            self._archive.moved(self.state)
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, enough to make an empty bank like this one as it is now."""
        # a model around the bank may have been cast since
        return self._config | ({} if self.quantized else {"dtype": name_of(self.slots.dtype)})

    @locked
    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Forget everything, of all streams or of those named, in the archive too; that synchronises.

        Of all streams it also makes a bank whole that `to_empty` brought from the meta device.

        Raises:
            TypeError, ValueError: No such stream; nothing has changed then.
            RuntimeError: The disk does not take the archive's part; it is forgotten here and there all the same.
        """
        which = slice(None) if streams is None else as_streams(streams, self.streams).to(self.entry.device)
        if self._archive is not None:
            for stream in range(self.streams)[which] if isinstance(which, slice) else which.tolist():
                self._archive.forget(stream, None)
        for name in BankState._fields:
            getattr(self, name)[which] = -1 if name in ("entry", "order") else 0
        if streams is None:
            for name, table in self._constants().items():
                getattr(self, name).copy_(table)
        if self._archive is not None:
            self._archive.flush()

    def _constants(self) -> dict[str, Tensor]:
        """Buffers that no push changes."""
        tables = row_tables(self.layout, self.levels, self.entry.device)
        return {"maps": layout_maps(self.layout, self.descriptor), **tables}

    @locked
    def snapshot(self) -> BankState:
        """A copy of the state; `restore` takes it back."""
        return BankState(*(t.clone() for t in self.state))

    @locked
    def restore(self, snapshot: BankState) -> None:
        """Go back to a snapshot of a bank of the same shape.

        An archive keeps what has left since, for `recall`; `fork` and `erase` no longer take it for this memory's past.

        Looks at what the snapshot says of itself, which synchronises the host.

        Raises:
            ValueError: The snapshot's shapes or dtypes are not this bank's, or its lists and counters are none that a
                bank has; nothing has changed then.
        """
        self.check(snapshot)
        self._take(snapshot)

    def _take(self, snapshot: BankState) -> None:
        for held, new in zip(self.state, snapshot, strict=True):
            held.copy_(new)
        if self._archive is not None:
            self._archive.branch(self.counter[:, SEEN])

    def check(self, snapshot: BankState) -> None:
        """A snapshot is one that this bank can hold.

        Raises:
            ValueError: Its shapes, dtypes, lists or counters are others.
        """
        if not isinstance(snapshot, BankState):
            raise ValueError(f"snapshot: expected BankState, got {type(snapshot).__name__}")
        for name, held, new in zip(BankState._fields, self.state, snapshot, strict=True):
            if held.shape != new.shape or held.dtype != new.dtype:
                raise ValueError(
                    f"snapshot.{name}: expected {shape_of(held)} {held.dtype}, got {shape_of(new)} {new.dtype}"
                )
        if not snapshot.order.is_meta:
            check_state(self.layout, snapshot)

    def save(
        self, path: str | Path, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write the state to a `.vmem` file (safetensors); a file that exists survives until the new one is whole.

        Args:
            path: Where to write. One copy of the state is taken first; other threads may push while it is written.
            extra: Further tensors to keep with the memory, for example thumbnails.
            notes: Further plain values, stored as JSON.

        Raises:
            OSError: The disk does not take it.
            ValueError: At `path` there is something else than a file.
        """
        self.to_file(extra, notes).write(Path(path))

    @locked
    def to_file(self, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None) -> BankFile:
        """What `save` writes, as it is now: a copy of the state, and `extra` and `notes` as they are."""
        return BankFile(self.policy, self.config(), self.snapshot()._asdict(), extra or {}, notes or {})
