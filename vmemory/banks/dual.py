"""Working and episodic memory, read by attention, fused by a gate, updated frame by frame: VLM²."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmemory.banks.budget import parse_bytes
from vmemory.banks.dual_input import DualInput, own_dtype
from vmemory.banks.dual_read import DualReads
from vmemory.banks.dual_state import capacities_within, new_state
from vmemory.banks.dual_step import DualStep
from vmemory.banks.files import BankFile
from vmemory.banks.lock import MemoryLock, locked
from vmemory.banks.quantized import name_of
from vmemory.banks.streams import check_rows
from vmemory.banks.tiers import check_grid, make_layout
from vmemory.banks.times import Times
from vmemory.banks.tokens import MemoryTokens, compact_tokens, padded_tokens, row_tables
from vmemory.ops._checks import check_device, check_int, shape_of

_WEIGHTS = "weights."
# what weights were trained for; the other options say how much is kept, and what of it
_TRAINED = ("key_dim", "heads", "hidden", "activation", "empty", "slots", "salience", "residual")


class DualMemory(DualStep, DualInput, DualReads):
    """A working memory of the last frames and an episodic memory of what was made of them, read by every frame.

    For a frame H_t: M^w = attention of H_t over the working memory, M^e = attention of H_t over the episodic memory,
    M_t = γ · M^w + (1 − γ) · M^e with γ = σ(MLP([M^w; M^e])). Then H_t enters the working memory, first in, first out,
    and M_t the episodic memory, where it replaces the most similar slot once all are taken. Reads precede writes.

    Keys and values are projected once, when a slot is written, and kept: changing the weights leaves those of earlier
    frames as they are until `refresh` (`load_state_dict` calls it). State is device tensors of fixed shape, changed in
    place without host synchronisation; it is not part of `state_dict`, and travels by `snapshot` and `save`.

    Any call may come from any thread: calls on one memory take turns, as with `Bank`.

    A frame that is not finite, or of which no cell exists, is numbered and enters neither memory; nor does an M_t that
    is not finite enter the episodic one. One such slot would make every later frame NaN.

    With `residual` M_t is H_t + α · (γ · M^w + (1 − γ) · M^e − H_t), of which α is learned and 0 at first: untrained,
    every frame passes as it came, to the bit, and both memories hold frames as they came. A first training step
    reaches α, those after it all weights. Without, M_t is what Algorithm 1 says, and of random weights of little use.

    Args:
        dim: Channels D of a token.
        grid: Token grid (H, W) of the frames.
        capacities: Slots (L_w, L_e) of the working and the episodic memory; a memory of 0 slots is always empty.
            None = (8, 32) without a `budget`.
        heads: Attention heads, a divisor of `dim`.
        hidden: Width of the gate's MLP; None = `dim`.
        activation: Of the gate's MLP: `"relu"`, `"gelu"` or `"silu"`.
        empty: What is read from an empty memory: `"frame"`, the frame attends to itself, at the price of one more
            projection to keys and values a frame; `"zeros"`; `"skip"`, the frame unchanged.
        slots: A slot holds a frame's `"tokens"` or their mean alone (`"means"`).
        level: The cosine that finds the most similar slot is over all values of a slot (`"flat"`) or over the means of
            its tokens (`"mean"`, from a few values a slot).
        rule: `"most-similar"`, or `"bridged"`: the slot that its neighbours in time make most superfluous, see
            `vmemory.banks.dual_rules.bridged_slot`. Not from the paper; it keeps slots from freezing.
        salience: M_t enters the episodic memory only where σ(MLP(mean of M_t)) reaches this threshold; None = always.
            The choice passes no gradient.
        budget: `"64MiB"` or bytes instead of `capacities`: the most slots, one in five working, whose `nbytes`, weights
            apart, stay within it.
        streams: Number of streams S.
        device, dtype: Of weights and state.
        key_dim: Channels that memory reads and changes; what rides behind them (deepstack features) is kept beside H_t
            and M_t as it came. None = all.
        residual: Whether M_t is H_t and a learned share of what memory makes of it, as above.
        adapter: Module applied to frames first, for example `FeatureAdapter` where feature sizes differ.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.

    Source: VLM² (arXiv 2511.20644), Algorithm 1, equations 5 to 8, capacities of Table 7. The paper leaves open heads,
    output projection, MLP, empty memory, slot form and cosine; defaults are those of the public port
    (TumCucTom/VLM-memory), which also has the salience gate. There is no dropout here. α: ReZero (arXiv 2003.04887).
    """

    policy = "dual"
    # as many tokens as came, of whatever comes in place of a clip
    one_to_one = True

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        capacities: tuple[int, int] | None = None,
        *,
        heads: int = 8,
        hidden: int | None = None,
        activation: str = "relu",
        empty: str = "frame",
        slots: str = "tokens",
        level: str = "flat",
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
        check_int("dim", dim, low=1)
        key_dim = dim if key_dim is None else key_dim
        check_int("key_dim", key_dim, low=1, high=dim)
        hidden = key_dim if hidden is None else hidden
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected a floating dtype, got {dtype!r}")
        super().__init__(
            key_dim, heads, hidden, activation, empty, slots, level, rule, salience, residual, device, dtype
        )
        self._lock = MemoryLock()
        check_int("streams", streams, low=1)
        check_grid("grid", grid)
        form = (1, 1) if slots == "means" else None
        tokens = 1 if slots == "means" else math.prod(grid)
        if budget is not None:
            if capacities is not None:
                raise ValueError("budget: expected either capacities or a budget, got both")
            capacities = capacities_within(budget, streams, tokens, key_dim, dtype, dim - key_dim)
        capacities = (8, 32) if capacities is None else capacities
        if len(capacities) != 2:
            raise ValueError(f"capacities: expected (working, episodic), got {capacities!r}")
        self._layout = make_layout(dim, grid, capacities, (form, form), "paper", None, key_dim)
        self.budget = None if budget is None else parse_bytes(budget)
        self.dim, self.grid, self.streams, self.adapter = dim, self._layout[0].grid, streams, adapter
        self.capacities = (capacities[0], capacities[1])
        self.hold(new_state(streams, self.capacities, tokens, key_dim, device, dtype, dim - key_dim))
        for name, table in row_tables(*self._layout, device).items():
            self.register_buffer(name, table, persistent=False)
        self.register_load_state_dict_post_hook(_refresh)
        self._config = {
            "dim": dim, "grid": list(grid), "capacities": list(capacities), "heads": heads, "hidden": hidden,
            "activation": activation, "empty": empty, "slots": slots, "level": level, "rule": rule,
            "salience": salience, "streams": streams, "key_dim": key_dim, "residual": residual,
        }  # fmt: skip

    @property
    def capacity(self) -> int:
        """Slots of both memories of one stream."""
        return sum(self.capacities)

    # writing

    @torch.no_grad()
    @locked
    def push(
        self, frames: Tensor, time: Times = None, *, valid: Tensor | None = None, streams: Tensor | None = None
    ) -> Tensor:
        """Take frames in, oldest first, and return what each became. No host synchronisation, no gradient.

        Args:
            frames: `[S, T, H, W, D]`, or `[T, H, W, D]` for one stream, in the memory's dtype or one that it holds
                exactly, on its device.
            time: Seconds, `[T]` or `[S, T]` float64 or a float for T = 1, strictly increasing; None = unknown (NaN).
                Frames are numbered from 0 per stream all the same.
            valid: `[S, T, H, W]` or `[T, H, W]` bool, cells that exist; others are never read. From the first such push
                until `reset` attention looks at every slot of `"tokens"` through a mask, which costs what free slots
                otherwise save; a CUDA graph captured before has no mask.
            streams: `[S']` int64, the stream each row of `frames` belongs to, none twice, −1 = skip the row; None = all
                in order. With it the slots of the streams are copied for every frame, in order to be read.

        Returns:
            M_t in the layout of `frames`, in the memory's dtype; zeros for skipped rows and cells that do not exist.

        Raises:
            ValueError, TypeError: A shape, dtype or device does not fit, or times known to the host do not increase;
                nothing has changed then.
        """
        alone = isinstance(frames, Tensor) and frames.dim() == 4
        frames, valid = self._arrange(frames, valid)
        rows = self.streams
        if streams is not None:
            check_rows(streams, self.streams)
            check_device("streams", streams, "entry", self.entry)
            rows = streams.shape[0]
        if frames.shape[0] != rows:
            raise ValueError(f"frames: expected {rows} streams, got shape {shape_of(frames)}")
        times = self._times(time, frames, streams)
        if valid is not None:
            self.masked = True
        with own_dtype(frames):
            fused = self.run(self.state, frames, times, streams, valid, self.masked).unflatten(2, self.grid)
        return fused[0] if alone else fused

    @torch.no_grad()
    @locked
    def refresh(self) -> None:
        """Project the keys and values of every slot again, with the weights as they are now."""
        for reader, memory in ((self.working, "working"), (self.episodic, "episodic")):
            projected = reader.project(getattr(self, f"{memory}_tokens"))
            for name, new in zip(("keys", "values"), projected, strict=True):
                getattr(self, f"{memory}_{name}").copy_(new)

    # reading

    def transform(
        self, clip: Tensor, time: Times = None, *, valid: Tensor | None = None, through_slots: bool = False
    ) -> MemoryTokens:
        """All M_t of a clip, from an empty memory and without touching this one; differentiable.

        A memory within a `budget` has the slots that it allows for the clip's grid and channels. Gradients reach the
        weights and, through each frame's query, the clip. With them the keys and values of all slots are kept for every
        frame: T · (L_w + L_e) times those of a frame.

        Args:
            clip: `[T, H, W, C]`, or `[S, T, H, W, C]` for a padded result; any number of streams, any grid, and any
                number of channels from `key_dim` on.
            time: As in `push`.
            valid: As in `push`; cells that do not exist have no token. Without padding it costs a synchronisation.
            through_slots: Gradients also pass through the frames and fused frames that were stored; else these count as
                constants, as in the port.

        Returns:
            One token for each of the clip's, `source` = 0 … T·H·W − 1 (those that exist), level 0, weight 1.

        Raises:
            ValueError, TypeError: As in `push`.
        """
        # weights know nothing of grids and of what rides behind: only what is held has them
        frames, exists = self._arrange(clip, valid, any_size=True)
        times = self._times(time, frames, None, fresh=True)
        S, T, N, _ = frames.shape
        held = 1 if self.slots == "means" else N
        capacities = self.capacities
        if self.budget is not None:
            capacities = capacities_within(
                self.budget, self.streams, held, self.key_dim, frames.dtype, clip.shape[-1] - self.key_dim
            )
        L_w, L_e = (min(c, T) for c in capacities)
        state = new_state(S, (L_w, L_e), held, self.key_dim, frames.device, frames.dtype)
        with own_dtype(frames):
            fused = self.run(
                state, frames, times, None, exists, exists is not None, differentiable=torch.is_grad_enabled(),
                through_slots=through_slots,
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

    def compress(self, clip: Tensor, time: Times = None, *, valid: Tensor | None = None) -> MemoryTokens:
        """What takes a clip's place in a model: `transform(clip)`, not `push` and `read` as with other memories."""
        return self.transform(clip, time, valid=valid)

    # keeping

    @locked
    def reset(self, streams: Sequence[int] | None = None) -> None:
        super().reset(streams)
        # a memory that `to_empty` brought from the meta device has them no more
        for name, table in row_tables(*self._layout).items() if streams is None else ():
            getattr(self, name).copy_(table)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, enough to make an empty memory like this one."""
        # a model around the memory may have been cast since
        return self._config | {"dtype": name_of(self.working_tokens.dtype)}

    def like(self, grid: tuple[int, int], **changes: Any) -> DualMemory:
        """An empty memory for frames of another grid, with a copy of these weights and with these options.

        Args:
            grid: Token grid (H, W) of its frames.
            changes: Arguments of `DualMemory` that are to be others; `key_dim` and what weights are trained for cannot.

        Raises:
            ValueError, TypeError: An argument does not fit; the message names it.
        """
        kind = self.working_tokens
        given = {**self.config(), "grid": grid, "dtype": kind.dtype, "device": kind.device}
        if self.budget is not None or "budget" in changes:
            given |= {"capacities": None, "budget": None if "capacities" in changes else self.budget}
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
        """Write state and weights to a `.vmem` file; one that exists survives until the new one is whole.

        An adapter is not written: give the memory that `vmemory.banks.load` makes its own.

        Args:
            path: Where to write.
            extra: Further tensors to keep with the memory, for example thumbnails.
            notes: Further plain values, stored as JSON.
        """
        self.to_file(extra, notes).write(Path(path))

    @locked
    def to_file(self, extra: dict[str, Tensor] | None = None, notes: dict[str, Any] | None = None) -> BankFile:
        """What `save` writes, as it is now: a copy of state and weights, and `extra` and `notes` as they are."""
        weights = {_WEIGHTS + name: x.clone() for name, x in self.state_dict().items() if _saved(name)}
        state = self.snapshot()._asdict()
        return BankFile(self.policy, self.config(), state, {**(extra or {}), **weights}, notes or {})

    @staticmethod
    def weights_of(extra: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights among a file's further tensors, which they leave."""
        return {name.removeprefix(_WEIGHTS): extra.pop(name) for name in list(extra) if name.startswith(_WEIGHTS)}

    def check_weights(self, weights: dict[str, Tensor]) -> None:
        """Weights are as many and as large as this memory's, its adapter's left out.

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


def _saved(name: str) -> bool:
    return not name.startswith("adapter.")


def _refresh(memory: Any, keys: Any) -> None:
    memory.refresh()
