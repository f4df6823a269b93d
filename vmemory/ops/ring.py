"""Update memories of fixed slots in place: first in, first out, or replacement of the most similar slot."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmemory.ops._checks import check_choice, check_device, check_same, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import ring as _reference

_PUSH = Backends("ring_push_", cuda=True)
_READ = Backends("ring_read")
_REPLACE = Backends("slot_replace_", cuda=True)


class RingFrames(NamedTuple):
    """Frames `[S, M, N, D]`, oldest first, then zeros; count `[S]` int64, the number of frames."""

    frames: Tensor
    count: Tensor  # type: ignore[assignment]


def _fake_push(slots: Tensor, count: Tensor, frames: Tensor, streams: Tensor | None) -> None:
    return None


def _fake_read(slots: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return slots.new_empty(slots.shape), count.new_empty(count.shape)


def _fake_replace(
    slots: Tensor, count: Tensor, means: Tensor | None, frames: Tensor, streams: Tensor | None, level: str
) -> Tensor:
    return count.new_empty((frames.shape[0],))


_push = Op(
    "ring_push_", "(Tensor(a!) slots, Tensor(b!) count, Tensor frames, Tensor? streams) -> ()", _fake_push, stem="ring"
)
_read = Op("ring_read", "(Tensor slots, Tensor count) -> (Tensor, Tensor)", _fake_read, stem="ring")
_replace = Op(
    "slot_replace_",
    "(Tensor(a!) slots, Tensor(b!) count, Tensor(c!)? means, Tensor frames, Tensor? streams, str level) -> Tensor",
    _fake_replace,
    stem="ring",
)


def _check_state(name: str, x: Tensor, writes: bool) -> None:
    if x.requires_grad:
        raise ValueError(f"{name}: expected state without a gradient")
    if writes and not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, it is written in place")


def _check_ring(slots: Tensor, count: Tensor, writes: bool = True) -> None:
    check_tensor("slots", slots, "[S, M, N, D]", floating=True)
    _check_state("slots", slots, writes)
    check_tensor("count", count, "[S]")
    if count.dtype != torch.int64 or count.shape[0] != slots.shape[0]:
        raise ValueError(f"count: expected int64 [{slots.shape[0]}], got {count.dtype} of shape {shape_of(count)}")
    _check_state("count", count, writes)
    check_device("count", count, "slots", slots)


def _check_frames(frames: Tensor, layout: str, slots: Tensor, streams: Tensor | None) -> None:
    check_tensor("frames", frames, layout)
    check_same("frames", frames, "slots", slots)
    if frames.shape[-2:] != slots.shape[-2:]:
        N, D = slots.shape[-2:]
        raise ValueError(f"frames: expected {layout} with N = {N} and D = {D}, got shape {shape_of(frames)}")
    rows = slots.shape[0]
    if streams is not None:
        check_tensor("streams", streams, "[S']")
        if streams.dtype != torch.int64:
            raise ValueError(f"streams: expected int64, got {streams.dtype}")
        check_device("streams", streams, "slots", slots)
        rows = streams.shape[0]
    if frames.shape[0] != rows:
        raise ValueError(f"frames: expected {rows} streams, got shape {shape_of(frames)}")


@with_backends(_PUSH)
def ring_push_(
    slots: Tensor, count: Tensor, frames: Tensor, streams: Tensor | None = None, *, impl: Impl = "auto"
) -> None:
    """Write frames into a bounded first-in-first-out memory, in place and without host synchronisation.

    Frame t goes into slot `(count + t) % M`; then `count` grows by T. Of more than M frames the last M are written.

    Args:
        slots: `[S, M, N, D]`, contiguous, float64, float32, float16 or bfloat16; changed.
        count: `[S]` int64 on the device, contiguous: the number of frames ever pushed; changed. A negative count is an
            error on the CPU and counts as 0 on a GPU.
        frames: `[S, T, N, D]`, or `[S', T, N, D]` with `streams`; the dtype and device of `slots`, any strides.
        streams: `[S']` int64 on the device: the stream of each row of `frames`, without repetition. A number outside
            `range(S)`, by convention −1, skips the row.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Unsupported shape, dtype, device or layout; nothing has changed.
        RuntimeError: `impl` names an implementation that cannot run here, or a counter on the CPU is below 0.

    Source: the working memory of VLM² (arXiv 2511.20644), Algorithm 1, lines 9 to 15.
    """
    _check_ring(slots, count)
    _check_frames(frames, "[S, T, N, D]", slots, streams)
    picked = _PUSH.pick(slots, impl)
    frames = frames.detach()
    if picked == "reference":
        _reference.ring_push_(slots, count, frames, streams)
    else:
        _push(picked, slots, count, frames, streams)


@with_backends(_READ)
def ring_read(slots: Tensor, count: Tensor, *, impl: Impl = "auto") -> RingFrames:
    """Read a memory that `ring_push_` filled, in temporal order.

    Args:
        slots: `[S, M, N, D]`, as `ring_push_` left it.
        count: `[S]` int64 on the device: frames ever pushed.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `RingFrames(frames [S, M, N, D], count [S])`: the last `min(count, M)` frames, oldest first, then zeros; and
        their number. Not differentiable.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Unsupported shape, dtype or device.
        RuntimeError: `impl` names an implementation that cannot run here.
    """
    _check_ring(slots, count, writes=False)
    picked = _READ.pick(slots, impl)
    return RingFrames(*(_reference.ring_read(slots, count) if picked == "reference" else _read(picked, slots, count)))


@with_backends(_REPLACE)
def slot_replace_(
    slots: Tensor,
    count: Tensor,
    frames: Tensor,
    streams: Tensor | None = None,
    *,
    level: Literal["flat", "mean"] = "flat",
    means: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Write one frame per stream into a bounded memory, in place: append, or replace the most similar slot if full.

    Similarity is dot / (max(|a|, 1e-8) · max(|b|, 1e-8)), accumulated in float32 or better. Of equal slots the first is
    replaced. A NaN counts as the largest similarity, so a slot that is not finite is replaced first.

    Args:
        slots: `[S, M, N, D]`, contiguous, float64, float32, float16 or bfloat16; changed.
        count: `[S]` int64 on the device, contiguous: frames ever written, not negative; grows by 1; the first
            `min(count, M)` slots are taken.
        frames: `[S, N, D]`, or `[S', N, D]` with `streams`; the dtype and device of `slots`, any strides.
        streams: As in `ring_push_`.
        level: `"flat"` compares all N · D values of a frame, `"mean"` its mean over N.
        means: `[S, M, D]` float32 (float64 for float64), contiguous, for `level="mean"`: the slots' means from earlier
            calls; changed. With it a call reads the new frame only, instead of the whole memory.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[S]` or `[S']` int64, the slot that was replaced; −1 if none was (appended, skipped, or M = 0).

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Unsupported shape, dtype, device, layout or level; nothing has changed.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: the episodic memory of VLM² (arXiv 2511.20644), Algorithm 1 and Eq. 8, which do not define the operands of
    the cosine. The listing deletes and appends; here the frame takes the slot it replaces.
    """
    check_choice("level", level, ("flat", "mean"))
    _check_ring(slots, count)
    _check_frames(frames, "[S, N, D]", slots, streams)
    S, M, N, D = slots.shape
    if level == "mean" and N < 1:
        raise ValueError(f"slots: expected at least 1 token for level='mean', got shape {shape_of(slots)}")
    if means is not None:
        if level != "mean":
            raise ValueError(f"means: expected with level='mean' only, got level={level!r}")
        check_tensor("means", means, "[S, M, D]")
        wide = torch.float64 if slots.dtype == torch.float64 else torch.float32
        if means.shape != (S, M, D) or means.dtype != wide:
            raise ValueError(f"means: expected {wide} [{S}, {M}, {D}], got {means.dtype} of shape {shape_of(means)}")
        _check_state("means", means, writes=True)
        check_device("means", means, "slots", slots)
    picked = _REPLACE.pick(slots, impl)
    frames = frames.detach()
    if picked == "reference":
        return _reference.slot_replace_(slots, count, frames, streams, level, means)
    return _replace(picked, slots, count, means, frames, streams, level)
