"""Working and episodic memory, read by attention, fused by a gate, updated frame by frame: VLM²."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmemory.banks.dual_state import DualState, DualStateHolder, new_state
from vmemory.banks.dual_step import DualStep
from vmemory.banks.files import BankFile, BankFileError
from vmemory.banks.tiers import make_layout
from vmemory.banks.tokens import MemoryTokens, compact_tokens, padded_tokens, row_tables
from vmemory.ops._checks import check_device, check_int, check_same, check_tensor, shape_of

Times = float | Sequence[float] | Tensor | None

_WEIGHTS = "weights."


class DualMemory(DualStep, DualStateHolder):
    """A working memory of the last frames and an episodic memory of what was made of them, read by every frame.

    For a frame H_t: M^w = attention of H_t over the working memory, M^e = attention of H_t over the episodic memory,
    M_t = γ · M^w + (1 − γ) · M^e with γ = σ(MLP([M^w; M^e])). Then H_t enters the working memory, first in, first out,
    and M_t the episodic memory, where it replaces the most similar slot once all are taken. Reads precede writes.

    Keys and values are projected once, when a slot is written, and kept: changing the weights leaves those of earlier
    frames as they are until `refresh` (`load_state_dict` calls it). State is device tensors of fixed shape, changed in
    place without host synchronisation; it is not part of `state_dict`, and travels by `snapshot` and `save`.

    Args:
        dim: Channels D of a token.
        grid: Token grid (H, W) of the frames.
        capacities: Slots (L_w, L_e) of the working and the episodic memory; a memory of 0 slots is always empty.
        heads: Attention heads, a divisor of `dim`.
        hidden: Width of the gate's MLP; None = `dim`.
        activation: Of the gate's MLP: `"relu"`, `"gelu"` or `"silu"`.
        empty: What is read from an empty memory: `"frame"`, the frame attends to itself, at the price of two more
            projections for the first frame of a push; `"zeros"`; `"skip"`, the frame unchanged.
        slots: A slot holds a frame's `"tokens"` or their mean alone (`"means"`).
        level: The cosine that finds the most similar slot is over all values of a slot (`"flat"`) or over the means of
            its tokens (`"mean"`).
        rule: `"most-similar"`, or `"bridged"`: the slot that its neighbours in time make most superfluous, see
            `vmemory.banks.dual_state.bridged_slot`. Not from the paper; it keeps slots from freezing.
        salience: M_t enters the episodic memory only where σ(MLP(mean of M_t)) reaches this threshold; None = always.
            The choice passes no gradient.
        streams: Number of streams S.
        device, dtype: Of weights and state.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.

    Source: VLM² (arXiv 2511.20644), Algorithm 1, equations 5 to 8, capacities of Table 7. The paper leaves open heads,
    output projection, MLP, empty memory, slot form and cosine; defaults are those of the public port
    (TumCucTom/VLM-memory), which also has the salience gate. There is no dropout here.
    """

    policy = "dual"

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacities: tuple[int, int] = (8, 32),
        *,
        heads: int = 8,
        hidden: int | None = None,
        activation: str = "relu",
        empty: str = "frame",
        slots: str = "tokens",
        level: str = "flat",
        rule: str = "most-similar",
        salience: float | None = None,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        hidden = dim if hidden is None else hidden
        super().__init__(dim, heads, hidden, activation, empty, slots, level, rule, salience, device, dtype)
        check_int("streams", streams, low=1)
        if len(capacities) != 2:
            raise ValueError(f"capacities: expected (working, episodic), got {capacities!r}")
        form = (1, 1) if slots == "means" else None
        layout, levels = make_layout(dim, grid, capacities, (form, form), "paper", None, dim)
        self.dim, self.grid, self.streams = dim, layout.grid, streams
        self.capacities = (capacities[0], capacities[1])
        tokens = 1 if slots == "means" else grid[0] * grid[1]
        state = new_state(streams, self.capacities, tokens, dim, rule == "bridged", device, dtype)
        self.hold(state)
        for name, table in row_tables(layout, levels).items():
            self.register_buffer(name, table.to(device), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)
        self._config = {
            "dim": dim, "grid": list(grid), "capacities": list(capacities), "heads": heads, "hidden": hidden,
            "activation": activation, "empty": empty, "slots": slots, "level": level, "rule": rule,
            "salience": salience, "streams": streams, "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip

    # writing

    @torch.no_grad()
    def push(self, frames: Tensor, time: Times = None, *, streams: Tensor | None = None) -> Tensor:
        """Take frames in, oldest first, and return what each became. No host synchronisation, no gradient.

        Args:
            frames: `[S, T, H, W, D]`, or `[T, H, W, D]` for one stream, in the memory's dtype and on its device.
            time: Seconds, `[T]` or `[S, T]` float64 or a float for T = 1, strictly increasing; None = unknown (NaN).
                Frames are numbered from 0 per stream all the same.
            streams: `[S']` int64, the stream each row of `frames` belongs to, none twice, −1 = skip the row; None = all
                in order. With it the slots of the streams are copied for every frame, in order to be read.

        Returns:
            M_t in the shape of `frames`; zeros for skipped rows.

        Raises:
            ValueError, TypeError: A shape, dtype or device does not fit, or times known to the host do not increase;
                nothing has changed then.
        """
        frames, shape = self._frames(frames)
        rows = self.streams
        if streams is not None:
            check_tensor("streams", streams, "[S]")
            if streams.dtype != torch.int64:
                raise ValueError(f"streams: expected int64, got {streams.dtype}")
            check_device("streams", streams, "entry", self.entry)
            rows = streams.shape[0]
        if frames.shape[0] != rows:
            raise ValueError(f"frames: expected {rows} streams, got shape {shape_of(frames)}")
        times = self._times(time, frames, streams)
        return self.run(self.state, frames, times, streams).view(shape)

    def _frames(self, frames: Tensor) -> tuple[Tensor, torch.Size]:
        """`frames` as `[S, T, N, D]`, and the shape they came in."""
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: expected a tensor [S, T, H, W, D] or [T, H, W, D], got {type(frames).__name__}")
        H, W = self.grid
        if frames.dim() not in (4, 5) or frames.shape[-3:] != (H, W, self.dim):
            raise ValueError(
                f"frames: expected [S, T, {H}, {W}, {self.dim}] or [T, {H}, {W}, {self.dim}], "
                f"got shape {shape_of(frames)}"
            )
        check_same("frames", frames, "the memory", self.working_tokens)
        rows = frames if frames.dim() == 5 else frames[None]
        return rows.flatten(2, 3), frames.shape

    def _times(self, time: Times, frames: Tensor, streams: Tensor | None, fresh: bool = False) -> Tensor:
        """`time` as `[S, T]` float64 on the device; not `fresh` = times have to exceed those held."""
        S, T = frames.shape[:2]
        if time is None:
            return torch.full((S, T), torch.nan, dtype=torch.float64, device=frames.device)
        times = time if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)
        if times.dtype != torch.float64:
            raise ValueError(f"time: expected float64 seconds, got {times.dtype}")
        if times.dim() == 0 and T == 1:
            times = times[None]
        if times.shape not in ((T,), (S, T)):
            raise ValueError(f"time: expected shape [{T}] or [{S}, {T}], got {shape_of(times)}")
        times = times.expand(S, T).contiguous()
        if times.device.type == "cpu" and not torch.compiler.is_compiling():
            if bool((times.diff(dim=1) <= 0).any()):
                raise ValueError("time: expected strictly increasing seconds along the frames")
            if self.clock.device.type == "cpu" and T and not fresh:
                clock, live = self.clock, self.entry >= 0
                if streams is not None:
                    here = streams.clamp(0, self.streams - 1)
                    clock, live = clock[here], live[here] & (here == streams)[:, None]
                late = live & (clock >= times[:, :1])
                if bool(late.any()):
                    raise ValueError(f"time: expected more than {float(clock[late].max())} s, the last seen, got less")
        return times.to(frames.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Project the keys and values of every slot again, with the weights as they are now."""
        for reader, memory in ((self.working, "working"), (self.episodic, "episodic")):
            projected = reader.project(getattr(self, f"{memory}_tokens"))
            for name, new in zip(("keys", "values"), projected, strict=True):
                getattr(self, f"{memory}_{name}").copy_(new)

    # reading

    def transform(self, clip: Tensor, time: Times = None, *, through_slots: bool = False) -> MemoryTokens:
        """All M_t of a clip, from an empty memory and without touching this one; differentiable.

        Gradients reach the weights and, through each frame's query, the clip. In training, all slots are kept for every
        frame: T · (L_w + L_e) times the keys and values of a frame.

        Args:
            clip: `[T, H, W, D]`, or `[S, T, H, W, D]` for a padded result; any number of streams.
            time: As in `push`.
            through_slots: Gradients also pass through the frames and fused frames that were stored; else these count as
                constants, as in the port.

        Returns:
            One token for each of the clip's, `source` = 0 … T·H·W − 1, level 0, weight 1.

        Raises:
            ValueError, TypeError: As in `push`.
        """
        frames, shape = self._frames(clip)
        times = self._times(time, frames, None, fresh=True)
        S, T, N, D = frames.shape
        L_w, L_e = (min(c, T) for c in self.capacities)
        n = self.working_tokens.shape[2]
        state = new_state(S, (L_w, L_e), n, D, self.rule == "bridged", frames.device, frames.dtype)
        fused = self.run(
            state, frames, times, None, differentiable=torch.is_grad_enabled(), through_slots=through_slots
        )
        source = torch.arange(T * N, device=frames.device).expand(S, T * N)
        seconds = times.repeat_interleave(N, 1)
        tokens = MemoryTokens(
            tokens=fused.flatten(1, 2), frame=source // N, time=seconds, cell=source % N,
            level=torch.zeros_like(source), weight=torch.ones_like(source, dtype=torch.float32), source=source, start=seconds, stop=seconds,
            count=torch.full((S,), T * N, device=frames.device),
        )  # fmt: skip
        return MemoryTokens(*(x[0] for x in tokens[:-1])) if len(shape) == 4 else tokens

    def read(self, stream: int = 0, *, padded: bool = False) -> MemoryTokens:
        """The slots of both memories in stream order, `level` 0 = working (H_t), 1 = episodic (M_t).

        A frame that both hold comes twice, cell by cell, working first: `source` is unique within a level.

        Args:
            stream: Which stream; ignored by a padded read.
            padded: `[S, Nmax, ...]` of all streams with `count [S]`, without host synchronisation; else one stream,
                compact, at the price of one synchronisation.
        """
        tables = {name: getattr(self, name) for name in ("row_slot", "row_cell", "row_level")}
        slots = torch.cat([self.working_tokens.flatten(1, 2), self.episodic_tokens.flatten(1, 2)], 1)
        cells = self.grid[0] * self.grid[1]
        weight = cells / self.working_tokens.shape[2]
        mass = (self.entry[:, tables["row_slot"]] >= 0).float() * weight
        entry, clock = self.entry[..., None], self.clock[..., None].expand(*self.clock.shape, 3)
        tokens = padded_tokens(slots, mass, entry, clock, tables, cells)
        if padded:
            return tokens
        check_int("stream", stream, low=0, high=self.streams - 1)
        return compact_tokens(tokens, stream)

    # keeping

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, enough to make an empty memory like this one."""
        return dict(self._config)

    def save(
        self, path: str | Path, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write state and weights to a `.vmem` file; one that exists survives until the new one is whole.

        Args:
            path: Where to write.
            extra: Further tensors to keep with the memory, for example thumbnails.
            notes: Further plain values, stored as JSON.
        """
        weights = {_WEIGHTS + name: weight for name, weight in self.state_dict().items()}
        state = self.state._asdict()
        BankFile(self.policy, self.config(), state, {**(extra or {}), **weights}, notes or {}).write(Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> tuple[DualMemory, BankFile]:
        """The memory that `save` wrote, with its weights, and the file's other contents.

        Raises:
            BankFileError: The file cannot be used; one line says why.
        """
        file = BankFile.read(Path(path))
        if file.policy != cls.policy:
            raise BankFileError(f"{path}: holds a memory of policy {file.policy!r}, expected {cls.policy!r}")
        memory = cls(**{**file.config, "dtype": getattr(torch, str(file.config["dtype"]))}, device=device)
        weights = {n.removeprefix(_WEIGHTS): file.extra.pop(n) for n in list(file.extra) if n.startswith(_WEIGHTS)}
        memory.load_state_dict(weights)
        memory.restore(DualState(**{name: x.to(device) for name, x in file.state.items()}))
        return memory, file


def _refresh(memory: Any, keys: Any) -> None:
    memory.refresh()
