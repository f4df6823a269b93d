"""A working and an episodic memory, read by attention, fused by a gate, updated frame by frame: VLM²."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vmemory.banks.archive.archive import Archive
from vmemory.banks.arguments import Times, as_streams, as_times, check_rows, check_seconds, on_device, with_streams
from vmemory.banks.dual.rules import RULES, overwrite_entropy
from vmemory.banks.dual.state import DualState, capacity_within, check_dual_state, new_state
from vmemory.banks.dual.step import DualWeights, MemoryReader, run
from vmemory.banks.io import BankFile
from vmemory.banks.layout import check_grid, make_layout, parse_bytes
from vmemory.banks.lock import MemoryLock, alone, locked
from vmemory.banks.quantization import name_of
from vmemory.banks.registry import register_policy
from vmemory.banks.results import (
    Entries,
    MemoryTokens,
    SearchResult,
    Tier,
    compact_tokens,
    padded_tokens,
    row_tables,
)
from vmemory.banks.state import check_snapshot
from vmemory.ops._checks import check_choice, check_device, check_int, check_same, check_tensor, shape_of
from vmemory.ops.similarity_topk import similarity_topk

# never narrower than float32 when a model around them is cast
_KEPT = ("working_means", "episodic_means", "mass", "clock")
_WEIGHTS = "weights."
# options that the weights depend on; the other options determine the stored data
_TRAINED = ("key_dim", "heads", "hidden", "activation", "empty", "slots", "salience", "residual")


@register_policy
class DualMemory(nn.Module):
    """A working and an episodic memory that every frame reads by attention; a learned gate fuses both readings.

    For a frame H_t: M^w = attention of H_t over the working memory, M^e = attention of H_t over the episodic memory,
    M_t = γ · M^w + (1 − γ) · M^e with γ = σ(MLP([M^w; M^e])). Then H_t enters the working memory, first in, first out,
    and M_t the episodic memory, where it replaces the most similar slot once all are taken. Reads precede writes.

    Keys and values are projected once, when a slot is written, and stored. After a change of the weights, those of
    earlier frames stay old until `refresh` (`load_state_dict` calls it). The state consists of device tensors of fixed
    shape, changed in place without host synchronisation. It is not part of `state_dict`; use `snapshot` and `save`.

    Any call may come from any thread: calls on one memory take turns, as with `Bank`.

    A frame that is not finite, or of which no cell exists, is numbered and enters neither memory; nor does an M_t that
    is not finite enter the episodic one. One such slot would make every later frame NaN.

    With `residual` M_t is H_t + α · (γ · M^w + (1 − γ) · M^e − H_t), where α is learned and starts at 0. Untrained, M_t
    is bit-identical to H_t, and both memories hold unchanged frames. The first training step changes α only, later
    steps all weights. Without `residual` M_t is that of Algorithm 1, which is of little use with random weights.

    Args:
        dim: Channels D of a token.
        grid: Token grid (H, W) of the frames.
        capacity: Slots (L_w, L_e) of the working and the episodic memory; a memory of 0 slots is always empty.
            None = (8, 32) without a `budget`.
        heads: Attention heads, a divisor of `dim`.
        hidden: Width of the gate's MLP; None = `dim`.
        activation: Activation of the gate's MLP: `"relu"`, `"gelu"` or `"silu"`.
        empty: Reading of an empty memory: `"frame"`, the frame attends to itself, which costs one more projection to
            keys and values per frame; or `"zeros"`.
        slots: Content of a slot: a frame's `"tokens"`, or only their mean (`"means"`).
        rule: The slot that a full episodic memory replaces: `"most-similar"`, by the cosine over all values of a slot,
            or `"bridged"`, the one that its neighbours in time make most superfluous, see
            `vmemory.banks.dual.rules.bridged_slot`. Not from the paper; it keeps slots from freezing.
        salience: M_t enters the episodic memory only where σ(MLP(mean of M_t)) reaches this threshold; None = always.
            The choice passes no gradient.
        budget: `"64MiB"` or bytes instead of `capacity`: the most slots, one in five working, whose `nbytes`, weights
            apart, stay within it.
        streams: Number of streams S.
        device, dtype: Of weights and state.
        key_dim: Number of leading channels that the memory reads and changes; further channels (deepstack features) are
            stored unchanged. None = all.
        residual: Whether M_t is a residual with a learned share α, as above.
        adapter: Module applied to frames first, for example `FeatureAdapter` for other feature sizes.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.

    Source: VLM² (arXiv 2511.20644), Algorithm 1, equations 5 to 8, capacities of Table 7. The paper leaves open heads,
    output projection, MLP, empty memory, slot form and cosine; defaults are those of the public port
    (TumCucTom/VLM-memory), which also has the salience gate. There is no dropout here. α: ReZero (arXiv 2003.04887).
    """

    # the state, registered as buffers
    working_tokens: Tensor
    working_keys: Tensor
    working_values: Tensor
    working_means: Tensor
    working_extra: Tensor
    episodic_tokens: Tensor
    episodic_keys: Tensor
    episodic_values: Tensor
    episodic_means: Tensor
    episodic_extra: Tensor
    mass: Tensor
    entry: Tensor
    clock: Tensor
    seen: Tensor
    entered: Tensor
    written: Tensor
    overwrites: Tensor
    alpha: nn.Parameter | None

    policy = "dual"
    # `compress` returns as many tokens as the clip has
    one_to_one = True

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacity: tuple[int, int] | None = None,
        *,
        heads: int = 8,
        hidden: int | None = None,
        activation: str = "relu",
        empty: str = "frame",
        slots: str = "tokens",
        rule: str = "most-similar",
        salience: float | None = None,
        budget: str | int | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        key_dim: int | None = None,
        residual: bool = False,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # held by every call that reads or changes the state
        self._lock = MemoryLock()
        check_int("dim", dim, low=1)
        key_dim = dim if key_dim is None else key_dim
        check_int("key_dim", key_dim, low=1, high=dim)
        hidden = key_dim if hidden is None else hidden
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected a floating dtype, got {dtype!r}")
        _check_options(key_dim, heads, hidden, activation, empty, slots, rule, salience, residual)
        check_int("streams", streams, low=1)
        check_grid("grid", grid)
        form = (1, 1) if slots == "means" else None
        tokens = 1 if slots == "means" else math.prod(grid)
        if budget is not None:
            if capacity is not None:
                raise ValueError("budget: expected either capacity or a budget, got both")
            capacity = capacity_within(budget, streams, tokens, key_dim, dtype, dim - key_dim)
        capacity = (8, 32) if capacity is None else capacity
        if len(capacity) != 2:
            raise ValueError(f"capacity: expected (working, episodic), got {capacity!r}")
        self._layout = make_layout(dim, grid, capacity, (form, form), "paper", None, key_dim)
        self.budget = None if budget is None else parse_bytes(budget)
        self.dim, self.grid, self.streams, self.adapter = dim, self._layout[0].grid, streams, adapter
        self.key_dim, self.slots, self.rule = key_dim, slots, rule
        self.capacities = (capacity[0], capacity[1])
        self.activation: Literal["relu", "gelu", "silu"] = activation  # type: ignore[assignment]  # checked above
        self.empty, self.threshold = empty, salience
        # whether some tokens of slots do not exist, so that attention must read the mass of each token
        self.masked = False
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.working = MemoryReader(key_dim, heads, **kind)
        self.episodic = MemoryReader(key_dim, heads, **kind)
        self.gate_in = nn.Linear(2 * key_dim, hidden, **kind)
        self.gate_out = nn.Linear(hidden, key_dim, **kind)
        self.salience: nn.Sequential | None = None
        if salience is not None:
            half = max(key_dim // 2, 1)
            self.salience = nn.Sequential(nn.Linear(key_dim, half, **kind), nn.ReLU(), nn.Linear(half, 1, **kind))
        # one element and not a scalar, because FSDP does not shard scalars
        self.register_parameter("alpha", nn.Parameter(torch.zeros(1, **kind)) if residual else None)
        state = new_state(streams, self.capacities, tokens, key_dim, device, dtype, dim - key_dim)
        for name, buffer in state._asdict().items():
            self.register_buffer(name, buffer, persistent=False)
        for name, table in row_tables(*self._layout, device).items():
            self.register_buffer(name, table, persistent=False)
        self.register_load_state_dict_post_hook(_refresh)
        self._config = {
            "dim": dim, "grid": list(grid), "capacity": list(capacity), "heads": heads, "hidden": hidden,
            "activation": activation, "empty": empty, "slots": slots, "rule": rule, "salience": salience,
            "streams": streams, "key_dim": key_dim, "residual": residual,
        }  # fmt: skip

    # facts

    @property
    def state(self) -> DualState:
        """The state tensors themselves, not copies."""
        return DualState(*(getattr(self, name) for name in DualState._fields))

    @property
    def _weights(self) -> DualWeights:
        return DualWeights(
            self.working, self.episodic, self.gate_in, self.gate_out, self.salience, self.alpha, self.key_dim,
            self.activation, self.empty, self.slots, self.rule, self.threshold,
        )  # fmt: skip

    @property
    def token_dtype(self) -> torch.dtype:
        """The dtype that frames must have."""
        return self.working_tokens.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of state held on the device, weights apart; constant from construction to the end."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    @property
    def capacity(self) -> int:
        """Slots of both memories of one stream."""
        return sum(self.capacities)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The memories that have slots: working, then episodic."""
        size = (1, 1) if self.slots == "means" else self.grid
        both = enumerate(zip(("working", "episodic"), self.capacities, strict=True))
        return tuple(Tier(name, level, size) for level, (name, slots) in both if slots)

    @property
    def archive(self) -> None:
        """Always None: entries depend on many frames, and there is no archive for them."""
        return None

    @archive.setter
    def archive(self, archive: Archive | None) -> None:
        if archive is not None:
            raise ValueError(f"archive: expected None, a dual memory has none, got {type(archive).__name__}")

    def bytes_in_use(self, stream: int = 0) -> int:
        """Return the bytes that the entries of a stream occupy; synchronises the host."""
        live = self.entry[stream] >= 0
        L_w = self.working_tokens.shape[1]
        state = self.state._asdict()
        parts = {"working": int(live[:L_w].sum()), "episodic": int(live[L_w:].sum())}
        slots = sum(
            n * state[f"{part}_{name}"][0, :1].nbytes
            for part, n in parts.items()
            for name in ("tokens", "keys", "values", "means", "extra")
        )
        return slots + int(live.sum()) * sum(state[name][0, :1].nbytes for name in ("mass", "entry", "clock"))

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, enough to make an empty memory like this one."""
        # the dtype may differ from the constructor's, if a model around the memory was cast
        return self._config | {"dtype": name_of(self.working_tokens.dtype)}

    # writing

    @torch.no_grad()
    @locked
    def push(
        self, frames: Tensor, time: Times = None, *, mask: Tensor | None = None, streams: Tensor | None = None
    ) -> Tensor:
        """Push frames, oldest first, and return M_t of each. No host synchronisation, no gradient.

        Args:
            frames: `[S, T, H, W, D]`, or `[T, H, W, D]` for one stream, in the memory's dtype or one that it holds
                exactly, on its device.
            time: Seconds, `[T]` or `[S, T]` float64 or a float for T = 1, strictly increasing; None = unknown (NaN).
                Frames are numbered from 0 per stream all the same.
            mask: `[S, T, H, W]` or `[T, H, W]` bool, cells that exist; others are never read. From the first such push
                until `reset`, attention over slots of `"tokens"` uses a mask, so free slots cost as much as full ones.
                A CUDA graph that was captured before has no mask.
            streams: `[S']` int64, the stream of each row of `frames`, none twice, −1 = skip the row; None = all in
                order. With `streams` each frame costs a copy of the streams' slots.

        Returns:
            M_t in the layout of `frames`, in the memory's dtype; zeros for skipped rows and cells that do not exist.

        Raises:
            ValueError, TypeError: A shape, dtype or device does not fit, or times known to the host do not increase;
                nothing has changed then.
        """
        alone = isinstance(frames, Tensor) and frames.dim() == 4
        frames, mask = self._arrange(frames, mask)
        rows = self.streams
        if streams is not None:
            check_rows(streams, self.streams)
            check_device("streams", streams, "entry", self.entry)
            rows = streams.shape[0]
        if frames.shape[0] != rows:
            raise ValueError(f"frames: expected {rows} streams, got shape {shape_of(frames)}")
        times = self._times(time, frames, streams)
        if mask is not None:
            self.masked = True
        with _own_dtype(frames):
            fused = run(self._weights, self.state, frames, times, streams, mask, self.masked).unflatten(2, self.grid)
        return fused[0] if alone else fused

    def _arrange(self, frames: Tensor, mask: Tensor | None, any_size: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return frames `[S, T, N, D]` and mask `[S, T, N]`; `any_size` = any grid, and at least key_dim channels."""
        frames, mask = with_streams(frames, mask)
        if self.adapter is not None:
            frames = self.adapter(frames)
        H, W = frames.shape[-3:-1] if any_size else self.grid
        D = max(frames.shape[-1], self.key_dim) if any_size else self.dim
        if frames.shape[-3:] != (H, W, D):
            raise ValueError(f"frames: expected [S, T, {H}, {W}, {D}], got shape {shape_of(frames)}")
        held, kind = self.working_tokens, frames.dtype
        if kind != held.dtype and kind.is_floating_point and torch.promote_types(kind, held.dtype) == held.dtype:
            frames = frames.to(held.dtype)
        check_same("frames", frames, "the memory", held)
        if mask is not None:
            check_tensor("mask", mask, "[S, T, H, W]")
            if mask.dtype != torch.bool or mask.shape != frames.shape[:-1]:
                wanted = shape_of(frames[..., 0])
                raise ValueError(f"mask: expected bool {wanted}, got {mask.dtype} of shape {shape_of(mask)}")
            check_device("mask", mask, "frames", frames)
            mask = mask.flatten(2)
        return frames.flatten(2, 3), mask

    def _times(self, time: Times, frames: Tensor, streams: Tensor | None, fresh: bool = False) -> Tensor:
        """Return `time` as `[S, T]` float64 on the device; not `fresh` = times have to exceed those held."""
        S, T = frames.shape[:2]
        if time is None:
            return torch.full((S, T), torch.nan, dtype=torch.float64, device=frames.device)
        times = as_times(time, S, T)
        check_seconds(times, None if fresh else (self.clock, self.entry >= 0), streams)
        return on_device(times, frames.device)

    @torch.no_grad()
    @locked
    def refresh(self) -> None:
        """Compute the keys and values of every slot again, with the weights as they are now."""
        for reader, memory in ((self.working, "working"), (self.episodic, "episodic")):
            projected = reader.project(getattr(self, f"{memory}_tokens"))
            for name, new in zip(("keys", "values"), projected, strict=True):
                getattr(self, f"{memory}_{name}").copy_(new)

    # reading

    def transform(
        self, clip: Tensor, time: Times = None, *, mask: Tensor | None = None, through_slots: bool = False
    ) -> MemoryTokens:
        """Return M_t of each frame of a clip, from an empty memory; differentiable. This memory does not change.

        With a `budget`, the number of slots follows from the clip's grid and channels. Gradients reach the weights and,
        through each frame's query, the clip. For them the keys and values of all slots are kept for every frame: T ·
        (L_w + L_e) times those of a frame.

        Args:
            clip: `[T, H, W, C]`, or `[S, T, H, W, C]` for a padded result; any number of streams, any grid, and any
                number of channels from `key_dim` on.
            time: As in `push`.
            mask: As in `push`; cells that do not exist have no token. Without padding it costs a synchronisation.
            through_slots: Whether gradients also pass through stored frames and stored M_t; otherwise these are
                constants, as in the port.

        Returns:
            One token for each of the clip's, `source` = 0 … T·H·W − 1 (those that exist), level 0, weight 1.

        Raises:
            ValueError, TypeError: As in `push`.
        """
        # weights do not depend on the grid and on further channels, only the stored data does
        frames, exists = self._arrange(clip, mask, any_size=True)
        times = self._times(time, frames, None, fresh=True)
        S, T, N, _ = frames.shape
        held = 1 if self.slots == "means" else N
        capacity = self.capacities
        if self.budget is not None:
            capacity = capacity_within(
                self.budget, self.streams, held, self.key_dim, frames.dtype, clip.shape[-1] - self.key_dim
            )
        L_w, L_e = (min(c, T) for c in capacity)
        state = new_state(S, (L_w, L_e), held, self.key_dim, frames.device, frames.dtype)
        with _own_dtype(frames):
            fused = run(
                self._weights, state, frames, times, None, exists, exists is not None,
                differentiable=torch.is_grad_enabled(), through_slots=through_slots,
            )  # fmt: skip
        one_frame = torch.zeros(T * N, dtype=torch.int64, device=frames.device)
        cell = torch.arange(T * N, device=frames.device)
        tables = {"row_slot": cell // max(N, 1), "row_cell": cell % max(N, 1), "row_level": one_frame}
        mass = torch.ones(S, T * N, device=frames.device) if exists is None else exists.flatten(1).float()
        entry = torch.arange(T, device=frames.device).expand(S, T)[..., None]
        tokens = padded_tokens(fused.flatten(1, 2), mass, entry, times[..., None].expand(S, T, 3), tables, N)
        if clip.dim() == 5:
            return tokens
        return MemoryTokens(*(x[0] for x in tokens[:-1])) if exists is None else compact_tokens(tokens, 0)

    def compress(self, clip: Tensor, time: Times = None, *, mask: Tensor | None = None) -> MemoryTokens:
        """Return `transform(clip)`, unlike banks, whose `compress` returns their content after the clip."""
        return self.transform(clip, time, mask=mask)

    @locked
    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens:
        """Return the slots of both memories in stream order, `level` 0 = working (H_t), 1 = episodic (M_t).

        A frame that is in both memories appears twice, cell by cell, working memory first. `source` is unique within a
        level.

        Args:
            stream: Which stream; ignored by a padded read.
            padded: `[S, Nmax, ...]` of all streams with `count [S]`, without host synchronisation; else one stream,
                compact, at the price of one synchronisation.

        Raises:
            ValueError: No such stream.
        """
        slots = torch.cat([self.working_tokens.flatten(1, 2), self.episodic_tokens.flatten(1, 2)], 1)
        if self.working_extra.shape[-1]:
            extra = torch.cat([self.working_extra.flatten(1, 2), self.episodic_extra.flatten(1, 2)], 1)
            slots = torch.cat([slots, extra], -1)
        tables = {name: getattr(self, name) for name in ("row_slot", "row_cell", "row_level")}
        clock = self.clock[..., None].expand(*self.clock.shape, 3)
        cells = self.grid[0] * self.grid[1]
        tokens = padded_tokens(slots, self.mass.flatten(1), self.entry[..., None], clock, tables, cells)
        if padded:
            return tokens
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        return compact_tokens(tokens, stream)

    @locked
    def search(self, query: Tensor, k: int, *, threshold: float | None = None, stream: int = 0) -> SearchResult:
        """Return the slots most similar to each query, by cosine with their means. Does not synchronise the host.

        Args:
            query: `[Q, D]` or `[Q, key_dim]`.
            k: Slots per query.
            threshold: Slots below this cosine are left out.
            stream: Which stream is searched.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        check_tensor("query", query, "[Q, D]")
        means = torch.cat([self.working_means, self.episodic_means], 1)
        if query.shape[1] not in (means.shape[2], means.shape[2] + self.working_extra.shape[3]):
            raise ValueError(f"query: expected [Q, {means.shape[2]}], got shape {shape_of(query)}")
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        there = (self.entry[stream] >= 0)[None]
        found = similarity_topk(query[None, :, : means.shape[2]].to(means.dtype), means[stream][None], k, where=there)
        values, slot = found.values[0], found.indices[0]
        if threshold is not None:
            slot = torch.where(values >= threshold, slot, -1)
            values = torch.where(values >= threshold, values, -torch.inf)
        # one more place behind the last slot, for index −1
        frame = torch.cat([self.entry[stream], self.entry.new_full((1,), -1)])[slot]
        time = torch.cat([self.clock[stream], self.clock.new_full((1,), torch.nan)])[slot]
        level = torch.where(slot < 0, -1, (slot >= self.working_means.shape[1]).long())
        return SearchResult(values, frame, time, level, time, time)

    @locked
    def entries(self, stream: int = 0) -> Entries:
        """Return what a stream holds, slot by slot in stream order, working before episodic; synchronises the host.

        Raises:
            ValueError: No such stream.
        """
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        slot = torch.nonzero(self.entry[stream] >= 0).flatten()
        slot = slot[self.entry[stream, slot].argsort(stable=True)]
        frame, time = self.entry[stream, slot], self.clock[stream, slot]
        means = torch.cat([self.working_means[stream], self.episodic_means[stream]])
        level = (slot >= self.working_means.shape[1]).long()
        return Entries(frame, frame, frame, torch.ones_like(frame), time, time, time, level, means[slot])

    @locked
    def counts(self, stream: int = 0) -> dict[str, int]:
        """Return numbers of frames and slots; synchronises the host.

        The frames that were `seen`, that `entered` the working memory, that were `written` into the episodic memory,
        and that were `dropped`, which are in no slot; and the slots `held`.

        Raises:
            ValueError: No such stream.
        """
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        held = self.entry[stream]
        held = held[held >= 0]
        numbers = torch.stack([self.seen[stream], self.entered[stream], self.written[stream]]).tolist()
        counts = dict(zip(("seen", "entered", "written"), numbers, strict=True))
        return counts | {"dropped": counts["seen"] - len(held.unique()), "held": len(held)}

    @locked
    def overwrite_entropy(self) -> Tensor:
        """Return `[S]` float64 bits: how evenly overwrites fell on the episodic slots, see `overwrite_entropy`."""
        return overwrite_entropy(self.overwrites)

    # going back

    @locked
    def reset(self, streams: Sequence[int] | None = None) -> None:
        """Remove everything from all streams or from those named; weights stay.

        Raises:
            TypeError, ValueError: No such stream; nothing has changed then.
        """
        if streams is None:
            self.state.clear_()
            self.masked = False
            # `to_empty` moves a memory from the meta device without their values
            for name, table in row_tables(*self._layout).items():
                getattr(self, name).copy_(table)
        else:
            self.state.clear_(as_streams(streams, self.entry.shape[0]).to(self.entry.device))

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Run a block whose pushes leave no trace: the state comes back, in the same tensors, also after an error."""
        with alone(self._lock):
            before = self.snapshot()
            try:
                yield
            finally:
                self._take(before)

    @torch.no_grad()
    @locked
    def erase(self, t0: float, t1: float, stream: int = 0) -> int:
        """Erase the span [t0, t1] of a stream: nothing computed from its frames remains, and freed bytes are zero.

        Every M_t depends on all earlier frames, so all slots written at t0 or later are removed, and frame numbers
        continue from there. If no slot was overwritten before, the result is the memory as it was before t0.

        Args:
            t0, t1: Seconds, both inclusive.
            stream: Which stream.

        Returns:
            Number of slots removed.

        Raises:
            ValueError: `t0` is above `t1` or NaN, or a slot has no time; nothing has changed.
        """
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        check_int("stream", stream, low=0, high=self.entry.shape[0] - 1)
        return self.state.until_(stream, t0, included=False)

    @torch.no_grad()
    @locked
    def fork(self, time: float | None = None) -> DualMemory:
        """Return an independent memory with the same weights in the state of this one, now or at second `time`.

        Raises:
            ValueError: A slot of the state at `time` has been overwritten since.
        """
        twin = copy.deepcopy(self)
        if time is None:
            return twin
        if math.isnan(time):
            raise ValueError("time: expected seconds, got NaN")
        held = (self.entry >= 0).sum(1)
        for stream in range(self.entry.shape[0]):
            whole = int(held[stream]) == int(self.entered[stream] + self.written[stream])
            if twin.state.until_(stream, time, included=True) and not whole:
                raise ValueError(f"time: expected a second since which nothing was given up, got {time:g} s")
        return twin

    @locked
    def snapshot(self) -> DualState:
        """Return a copy of the state, which `restore` takes back."""
        return DualState(*(x.clone() for x in self.state))

    @locked
    def restore(self, snapshot: tuple[Tensor, ...]) -> None:
        """Replace the state by a snapshot of a memory of the same shape and weights; synchronises the host.

        Raises:
            ValueError: The snapshot's shapes or dtypes are not this memory's, or its counters are none that a memory
                has; nothing has changed then.
        """
        self.check(snapshot)
        self._take(snapshot)

    def _take(self, snapshot: tuple[Tensor, ...]) -> None:
        for held, new in zip(self.state, snapshot, strict=True):
            held.copy_(new)
        self.masked = bool(((self.mass == 0) & (self.entry >= 0)[..., None]).any())

    def check(self, snapshot: tuple[Tensor, ...]) -> None:
        """Check that this memory can hold a snapshot.

        Raises:
            ValueError: Its shapes, dtypes, entries or counters are others.
        """
        check_snapshot(self.state, snapshot)
        assert isinstance(snapshot, DualState)
        if not snapshot.entry.is_meta:
            check_dual_state(snapshot._asdict())

    # keeping

    def like(self, grid: tuple[int, int], **changes: Any) -> DualMemory:
        """Return an empty memory for frames of another grid, with a copy of these weights and with these options.

        Args:
            grid: Token grid (H, W) of its frames.
            changes: Arguments of `DualMemory` with other values; arguments that the weights depend on cannot change.

        Raises:
            ValueError, TypeError: An argument does not fit; the message names it.
        """
        kind = self.working_tokens
        given = {**self.to_dict(), "grid": grid, "dtype": kind.dtype, "device": kind.device}
        if self.budget is not None or "budget" in changes:
            given |= {"capacity": None, "budget": None if "capacity" in changes else self.budget}
        given |= changes
        for name in _TRAINED:
            if given[name] != self._config[name]:
                raise ValueError(f"{name}: expected {self._config[name]!r}, as trained, got {given[name]!r}")
        memory = type(self)(**given, adapter=copy.deepcopy(self.adapter))
        memory.load_state_dict(self.state_dict())
        return memory

    def save(
        self, path: str | Path, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write state and weights to a `.vmem` file; an existing file stays until the new one is complete.

        An adapter is not written; set it after `vmemory.banks.load`.

        Args:
            path: Where to write.
            extra: Further tensors to keep with the memory, for example thumbnails.
            notes: Further plain values, stored as JSON.
        """
        self.to_file(extra, notes).write(Path(path))

    @locked
    def to_file(self, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None) -> BankFile:
        """Return what `save` writes: a copy of state and weights, with `extra` and `notes` as they are."""
        weights = {_WEIGHTS + name: x.clone() for name, x in self.state_dict().items() if _saved(name)}
        state = self.snapshot()._asdict()
        return BankFile(self.policy, self.to_dict(), state, {**(extra or {}), **weights}, notes or {})

    @staticmethod
    def weights_of(extra: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the weights out of a file's further tensors and return them."""
        return {name.removeprefix(_WEIGHTS): extra.pop(name) for name in list(extra) if name.startswith(_WEIGHTS)}

    def check_weights(self, weights: dict[str, Tensor]) -> None:
        """Check that weights are as many and as large as this memory's, its adapter's left out.

        Raises:
            ValueError: They are others.
        """
        own = {name: weight for name, weight in self.state_dict().items() if _saved(name)}
        if set(weights) != set(own):
            raise ValueError(f"weights: expected {', '.join(sorted(own))}, got {', '.join(sorted(weights))}")
        for name, weight in own.items():
            if weights[name].shape != weight.shape or weights[name].dtype != weight.dtype:
                want, got = (f"{shape_of(x)} {x.dtype}" for x in (weight, weights[name]))
                raise ValueError(f"weights.{name}: expected {want}, got {got}")

    @locked
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualMemory:
        kept = {name: getattr(self, name) for name in _KEPT}
        super()._apply(fn, recurse)
        wide = torch.promote_types(self.working_tokens.dtype, torch.float32)
        for name, old in kept.items():
            # times and masses keep their dtype, means have the one that operators require beside the tokens
            kind = wide if name.endswith("means") else old.dtype
            if getattr(self, name).dtype != kind:
                setattr(self, name, old.to(getattr(self, name).device, kind))
        return self


def _saved(name: str) -> bool:
    return not name.startswith("adapter.")


def _refresh(memory: Any, keys: Any) -> None:
    memory.refresh()


def _own_dtype(frames: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, because slots have the dtype of the weights."""
    kind = frames.device.type
    # `torch.autocast` alone takes a hundredth of a small push
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _check_options(
    dim: int, heads: int, hidden: int, activation: str, empty: str, slots: str, rule: str, salience: float | None,
    residual: bool,
) -> None:  # fmt: skip
    check_int("heads", heads, low=1)
    check_int("hidden", hidden, low=1)
    if dim % heads:
        raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
    check_choice("activation", activation, ("relu", "gelu", "silu"))
    check_choice("empty", empty, ("frame", "zeros"))
    check_choice("slots", slots, ("tokens", "means"))
    check_choice("rule", rule, RULES)
    if not isinstance(residual, bool):
        raise TypeError(f"residual: expected True or False, got {residual!r}")
    if salience is not None and not (isinstance(salience, (int, float)) and 0 <= salience <= 1):
        raise ValueError(f"salience: expected None or between 0 and 1, got {salience!r}")
