"""Neighbours in time, merged at each position of the grid on its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmemory.banks.arguments import Times, as_streams, as_times, check_rows
from vmemory.banks.layout import check_grid
from vmemory.banks.policies.merging import MergingBank
from vmemory.banks.results import MemoryTokens, compact_tokens
from vmemory.ops._checks import check_int, shape_of
from vmemory.reference.bank_layout import BankState


class TokenMergingBank(nn.Module):
    """A memory that merges the closest neighbours in time at every token position on its own.

    `MergingBank` merges whole frames, the pair whose means are most alike. Here each of the H·W positions chooses its
    own pair by the cosine of single tokens, so that one entry can hold different spans of time at different positions.
    Holding n entries it equals MA-LMM's bank of n − 1 and the newest frame beside it, for any number of tokens.

    Each position of each stream is a stream of one token of `bank`, a `MergingBank`; ask it for files, an archive
    and entries.

    Args:
        dim: Channels D of a token.
        grid: Token grid (H, W) of the frames.
        capacity: Entries held at each position.
        budget: `"64MiB"` or bytes instead of `capacity`.
        streams: Number of streams S.
        device, dtype, key_dim: As in `Bank`.

    Attributes:
        bank: Row s · H·W + n is position n of stream s.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: MA-LMM (arXiv 2404.05726) section 3.2.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: int | None = None,
        *,
        budget: str | int | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        key_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_grid("grid", grid)
        check_int("streams", streams, low=1)
        self.dim, self.grid, self.streams = dim, (int(grid[0]), int(grid[1])), streams
        self.cells = self.grid[0] * self.grid[1]
        self.bank = MergingBank(
            dim, (1, 1), capacity, budget=budget, streams=streams * self.cells, device=device, dtype=dtype,
            key_dim=key_dim,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Entries held at each position."""
        return self.bank.capacity

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: constant from construction to the end."""
        return self.bank.nbytes

    def push(
        self, frames: Tensor, time: Times = None, *, mask: Tensor | None = None, streams: Tensor | None = None
    ) -> None:
        """Take frames in, oldest first, as `Bank.push` does. No host synchronisation; a failed push changes nothing."""
        rows, when, there, _ = self._apart(frames, time, mask)
        if streams is not None:
            check_rows(streams, self.streams)
            place = torch.arange(self.cells, device=streams.device)
            streams = torch.where(streams[:, None] < 0, -1, streams[:, None] * self.cells + place).flatten()
        self.bank.push(rows, when, mask=there, streams=streams)

    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens:
        """Return everything held, in stream order, with provenance; arguments as in `Bank.read`."""
        tokens = self._together(self.bank.read(padded=True))
        if padded:
            return tokens
        check_int("stream", stream, low=0, high=self.streams - 1)
        return compact_tokens(tokens, stream)

    def compress(self, clip: Tensor, time: Times = None, *, mask: Tensor | None = None) -> MemoryTokens:
        """Return what a fresh memory would hold after `clip`; gradients reach the clip. As `Bank.compress`."""
        rows, when, there, several = self._apart(clip, time, mask)
        tokens = self._together(self.bank.compress(rows, when, mask=there))
        return tokens if several else compact_tokens(tokens, 0)

    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Remove everything from all streams or from those named."""
        self.bank.reset(None if streams is None else self._rows(as_streams(streams, self.streams)).tolist())

    def snapshot(self) -> BankState:
        """Return a copy of the state, which `restore` takes back."""
        return self.bank.snapshot()

    def restore(self, snapshot: BankState) -> None:
        """Replace the state by a snapshot of a memory of the same shape; arguments and errors as in `Bank.restore`."""
        self.bank.restore(snapshot)

    def fork(self, time: float | None = None) -> TokenMergingBank:
        """Return an independent memory in the state of this one, now or at second `time`; see `Bank.fork`."""
        return copy.deepcopy(self, {id(self.bank): self.bank.fork(time)})

    def erase(self, t0: float, t1: float, stream: int = 0, *, drop_dependent: bool = False) -> int:
        """Remove the frames from `t0` to `t1` seconds at every position; see `Bank.erase`.

        Returns:
            Entries removed, over all positions.
        """
        check_int("stream", stream, low=0, high=self.streams - 1)
        rows = self._rows(torch.tensor([stream])).tolist()
        return sum(self.bank.erase(t0, t1, row, drop_dependent=drop_dependent) for row in rows)

    def _rows(self, streams: Tensor) -> Tensor:
        return (streams[:, None] * self.cells + torch.arange(self.cells)).flatten()

    def _apart(
        self, frames: Tensor, time: Times, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
        """Return frames, times and mask with each position as a stream, and whether several streams came."""
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: expected a tensor [S, T, H, W, D] or [T, H, W, D], got {type(frames).__name__}")
        several = frames.dim() == 5
        if frames.dim() not in (4, 5) or tuple(frames.shape[-3:]) != (*self.grid, self.dim):
            wanted = ", ".join(map(str, (*self.grid, self.dim)))
            raise ValueError(f"frames: expected [S, T, {wanted}] or [T, {wanted}], got shape {shape_of(frames)}")
        S, T = frames.shape[:2] if several else (1, frames.shape[0])
        when = None if time is None else as_times(time, S, T).repeat_interleave(self.cells, 0)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != frames.shape[:-1]:
                want = list(frames.shape[:-1])
                raise ValueError(f"mask: expected bool {want}, got {mask.dtype} of shape {shape_of(mask)}")
            mask = self._by_position(mask[..., None], S, T)[..., 0]
        return self._by_position(frames, S, T), when, mask, several

    def _by_position(self, x: Tensor, S: int, T: int) -> Tensor:
        """Return `[S, T, H, W, D]` as `[S · H·W, T, 1, 1, D]`."""
        return x.reshape(S, T, self.cells, -1).transpose(1, 2).reshape(S * self.cells, T, 1, 1, -1)

    def _together(self, apart: MemoryTokens) -> MemoryTokens:
        """Return tokens `[S · H·W, M, ...]` of each position as `[S, H·W · M, ...]` in stream order, padding last."""
        rows, M = apart.source.shape
        S = rows // self.cells
        live = apart.source >= 0
        cell = torch.arange(self.cells, device=live.device).repeat(S)[:, None].expand(rows, M)
        source = apart.frame * self.cells + cell
        free = torch.iinfo(torch.int64).max
        order = torch.where(live, source, free).view(S, -1).argsort(dim=1, stable=True)

        def ordered(field: Tensor) -> Tensor:
            flat = field.reshape(S, self.cells * M, *field.shape[2:])
            return flat.gather(1, order.view(*order.shape, *[1] * (flat.dim() - 2)).expand_as(flat))

        placed = apart._replace(cell=torch.where(live, cell, -1), source=torch.where(live, source, -1))
        fields = {name: ordered(field) for name, field in placed._asdict().items() if name != "count"}
        return MemoryTokens(**fields, count=live.view(S, -1).sum(1))
