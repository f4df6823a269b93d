"""Run Algorithm 1 of VLM² frame by frame on a given state."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vmemory.banks.dual.rules import bridged_slot
from vmemory.banks.dual.slots import Arrived, Side, StreamMap, put
from vmemory.banks.dual.state import DualState
from vmemory.banks.interrupts import delayed_interrupts
from vmemory.ops.gated_fusion import gated_fusion
from vmemory.ops.memory_attention import memory_attention
from vmemory.ops.ring import ring_push_, slot_replace_


class MemoryReader(nn.Module):
    """Projections of one attention over a memory: query `[D, D]`, key and value `[2D, D]`, output `[D, D]`."""

    def __init__(self, dim: int, heads: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.key_value = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        # as torch.nn.MultiheadAttention initialises query, key and value, which there are one matrix
        for linear in (self.query, self.key_value):
            nn.init.uniform_(linear.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def load_attention(self, attention: nn.MultiheadAttention) -> None:
        """Copy the weights of a `torch.nn.MultiheadAttention`; call `DualMemory.refresh` afterwards.

        Raises:
            ValueError: Its width or heads differ, it has no biases, or its keys or values have another size.
        """
        dim = self.query.in_features
        if attention.embed_dim != dim or attention.num_heads != self.heads:
            raise ValueError(
                f"attention: expected {dim} channels and {self.heads} heads, "
                f"got {attention.embed_dim} and {attention.num_heads}"
            )
        if attention.in_proj_weight is None or attention.in_proj_bias is None or attention.bias_k is not None:
            raise ValueError("attention: expected one size for query, key and value, biases, and no bias_k")
        self.query.weight.copy_(attention.in_proj_weight[:dim])
        self.query.bias.copy_(attention.in_proj_bias[:dim])
        self.key_value.weight.copy_(attention.in_proj_weight[dim:])
        self.key_value.bias.copy_(attention.in_proj_bias[dim:])
        self.out.load_state_dict(attention.out_proj.state_dict())

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of tokens `[..., D]`."""
        key, value = self.key_value(tokens).chunk(2, -1)
        return key, value

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, count: Tensor, exists: Tensor | None) -> Tensor:
        """Attend with projected queries `[R, N, D]` over slots `[R, M, n, D]`, of which `count [R]` are in use.

        With `exists [R, M, n]` attention ignores `count` and uses the tokens that exist; if a row has none, all tokens.
        """
        heads = (self.heads, query.shape[-1] // self.heads)
        q, k, v = (x.unflatten(-1, heads) for x in (query, keys, values))
        if exists is None:
            return self.out(memory_attention(q, k, v, count).flatten(-2))
        seen = (exists | ~exists.any((1, 2), keepdim=True)).flatten(1)[:, None, None]
        k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))
        read = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen)
        return self.out(read.transpose(1, 2).flatten(-2))


class DualWeights(NamedTuple):
    """The modules and options of a dual memory, named as the arguments of `DualMemory`."""

    working: MemoryReader
    episodic: MemoryReader
    gate_in: nn.Linear
    gate_out: nn.Linear
    salience: nn.Sequential | None
    alpha: Tensor | None
    key_dim: int
    activation: Literal["relu", "gelu", "silu"]
    empty: str
    slots: str
    rule: str
    threshold: float | None


def _held(weights: DualWeights, frames: Tensor, mass: Tensor) -> Tensor:
    """Return the content `[..., n, D]` of slots for frames `[..., N, D]`, which are zero where `mass [..., N]` is."""
    return frames if weights.slots == "tokens" else _mean(frames, mass).to(frames.dtype)[..., None, :]


def run(
    weights: DualWeights, state: DualState, frames: Tensor, times: Tensor, streams: Tensor | None, mask: Tensor | None,
    masked: bool, *, differentiable: bool = False, through_slots: bool = False,
) -> Tensor:  # fmt: skip
    """Return M_t `[R, T, N, C]` of each frame; channels beyond the weights' D pass unchanged.

    Args:
        weights: Modules and options.
        state: Changed in place. It stores the channels beyond D only if it has room for them.
        frames: `[R, T, N, C]`.
        times: `[R, T]` float64.
        streams: `[R]` int64 stream of each row; rows outside of 0 to S − 1 are skipped and give zeros. None = all in
            order.
        mask: `[R, T, N]` bool, cells that exist; None = all.
        masked: Whether tokens of the state or of these frames may not exist.
        differentiable: Whether keys and values have gradients; then they are not written to `state`, and `streams` must
            be None.
        through_slots: Whether gradients also reach stored frames; otherwise only the projections.
    """
    (R, T, N, C), D = frames.shape, weights.key_dim
    if R == 0 or T == 0:
        return frames.new_zeros(frames.shape)
    stream_map = StreamMap.of(streams, state.seen.shape[0], R, frames.device)
    mass = torch.ones(R, T, N, device=frames.device) if mask is None else mask.float()
    if mask is not None:
        frames = torch.where(mask[..., None], frames, 0)
    # a value that is not finite would spread to every later frame
    usable = frames.isfinite().flatten(2).all(2) & (mass > 0).any(2)
    # a slot of means stands for all cells that its frame had
    weight = mass if weights.slots == "tokens" else mass.sum(2, keepdim=True)
    extra = extra_held = None
    if C > D:
        frames, extra = (x.contiguous() for x in frames.split([D, C - D], -1))
        if state.working_extra.shape[-1]:
            extra_held = _held(weights, torch.where(usable[..., None, None], extra, 0), mass)
    masked = masked and weights.slots == "tokens"
    to_working, to_episodic = weights.working.query(frames), weights.episodic.query(frames)
    stored = torch.where(usable[..., None, None], frames if through_slots else frames.detach(), 0)
    kept = _held(weights, stored, mass)
    keys, values = weights.working.project(kept)
    means = _mean(stored.detach(), mass)
    # a frame that reads an empty memory attends to itself, with a gradient even if slots are constants
    of_itself: tuple[tuple[Tensor, Tensor] | None, ...] = (None, None)
    if weights.empty == "frame":
        detached = differentiable and not through_slots
        itself = _held(weights, torch.where(usable[..., None, None], frames, 0), mass) if detached else kept
        of_itself = (weights.working.project(itself) if detached else (keys, values)), weights.episodic.project(itself)
    working, episodic = Side.both(state)
    fused = []
    for t in range(T):
        with delayed_interrupts():
            extra_frame = None if extra_held is None else extra_held[:, t]
            frame = Arrived(frames[:, t], weight[:, t], times[:, t], extra_frame, stream_map, masked, differentiable)
            answers = [
                _read(weights, reader, side, query[:, t], None if own is None else (own[0][:, t], own[1][:, t]), frame)
                for reader, side, query, own in (
                    (weights.working, working, to_working, of_itself[0]),
                    (weights.episodic, episodic, to_episodic, of_itself[1]),
                )
            ]
            m = gated_fusion(
                *answers, weights.gate_in.weight, weights.gate_in.bias, weights.gate_out.weight, weights.gate_out.bias,
                weights.activation,
            )  # fmt: skip
            if weights.alpha is not None:
                m = torch.lerp(frames[:, t], m, weights.alpha)
            if mask is not None:
                m = torch.where(mask[:, t, :, None], m, 0)
            fused.append(m if stream_map.whole else torch.where(stream_map.there[:, None, None], m, 0))
            number = state.seen.clone()
            state.seen.add_(stream_map.fed)

            rows, slot = torch.where(usable[:, t], stream_map.rows, -1), working.pushed.clone()
            ring_push_(working.tokens, working.pushed, kept[:, t, None], rows)
            working = working.store(slot, rows, keys[:, t], values[:, t], means[:, t], number, frame)

            fine = usable[:, t] & m.isfinite().flatten(1).all(1)
            m = torch.where(fine[:, None, None], m if through_slots else m.detach(), 0)
            mean = _mean(m.detach(), mass[:, t])
            if weights.salience is not None:
                fine = fine & (weights.salience(mean.to(m.dtype)).sigmoid()[:, 0] >= weights.threshold)
            rows, held = torch.where(fine, stream_map.rows, -1), _held(weights, m, mass[:, t])
            slot, full = _replace(weights, episodic, held, mean, rows, stream_map)
            episodic = episodic.store(slot, rows, *weights.episodic.project(held), mean, number, frame)
            state.overwrites.add_(episodic.hit(slot, stream_map.takes(rows) & full))
    out = torch.stack(fused, 1)
    if extra is None:
        return out
    if not stream_map.whole:
        extra = torch.where(stream_map.there[:, None, None, None], extra, 0)
    return torch.cat([out, extra], -1)


def _read(
    weights: DualWeights,
    reader: MemoryReader,
    side: Side,
    query: Tensor,
    own: tuple[Tensor, Tensor] | None,
    frame: Arrived,
) -> Tensor:
    """Attend to a memory, or if it is empty to the frame's `own` key and value `[R, n, D]`."""
    keys, values, mass, count, stream_map = side.keys, side.values, side.mass, side.pushed.clone(), frame.stream_map
    if not stream_map.whole:
        keys, values, mass = (x[stream_map.stream] for x in (keys, values, mass))
        count = torch.where(stream_map.there, count[stream_map.stream], 0)
    slots = keys.shape[1]
    empty = stream_map.there & (count <= 0) if slots else stream_map.there
    if own is not None and slots == 0:
        keys, values, mass, count = own[0][:, None], own[1][:, None], frame.mass[:, None], stream_map.there.long()
    elif own is not None:
        # the first slot of an empty memory is free: what is put there now is overwritten by the first entry
        hit = (torch.arange(slots, device=count.device) == 0) & empty[:, None]
        mass, count = torch.where(hit[..., None], frame.mass[:, None], mass), torch.where(empty, 1, count)
        if frame.differentiable:
            keys, values = (
                torch.where(hit[..., None, None], new[:, None], old)
                for new, old in zip(own, (keys, values), strict=True)
            )
        else:
            rows = torch.where(empty, torch.arange(len(empty), device=count.device), -1)
            for slots_of, new in zip((keys, values), own, strict=True):
                put(slots_of, torch.zeros_like(count), rows, new)
    read = reader(query, keys, values, count, mass > 0 if frame.masked else None)
    if own is None:
        read = torch.where(empty[:, None, None], 0, read)
    return read


def _replace(
    weights: DualWeights, side: Side, held: Tensor, mean: Tensor, rows: Tensor, stream_map: StreamMap
) -> tuple[Tensor, Tensor]:
    """Write `held [R, n, D]` of the rows that are not −1 into the episodic memory.

    Returns the slot `[S]` of each stream, and whether `[S]` the memory was full before.
    """
    at, capacity, held = side.pushed.clone(), side.tokens.shape[1], held.detach()
    if weights.rule == "most-similar" or capacity == 0:
        replaced = slot_replace_(side.tokens, side.pushed, held, rows)
        replaced = stream_map.of_streams(replaced)
        slot = torch.where(replaced >= 0, replaced, at)
    else:
        slot = torch.where(at >= capacity, bridged_slot(side.means, side.entry, stream_map.of_streams(mean)), at)
        put(side.tokens, slot, rows, held)
        side.pushed.add_(stream_map.takes(rows))
    return slot, at >= capacity


def _mean(frames: Tensor, mass: Tensor) -> Tensor:
    """Return the mean `[..., D]`, float32 or better, of frames `[..., N, D]` that are zero where `mass [..., N]` is."""
    wide = torch.promote_types(frames.dtype, torch.float32)
    return frames.sum(-2, dtype=wide) / mass.sum(-1, keepdim=True).clamp_min(1).to(wide)
