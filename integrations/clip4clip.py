"""CLIP4Clip and STOP: fewer frames before the vision tower, or fewer tokens inside it, with a matching mask.

Both are research code and not packages, so a model is recognised by its methods.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vmemory.compress import TempMe, tempme_from_arguments
from vmemory.compress.tempme_tower import vision_tower

_STATE = "_vmemory_clip4clip"


def family(model: nn.Module) -> Literal["clip4clip", "stop"]:
    """Return which of the two a model is, by its methods.

    CLIP4Clip has `get_visual_output(video, video_mask, shaped, video_frame)`, STOP
    `get_visual_output(video, unified_visual_prompt, video_mask, video_frame)` and `video_frames`; both have
    `get_similarity_logits(sequence_output, visual_output, attention_mask, video_mask, ...)` and a `clip`.

    Raises:
        TypeError: The model is neither.
    """
    named = {name: _parameters(model, name) for name in ("get_visual_output", "get_similarity_logits")}
    visual, logits = named.values()
    if isinstance(getattr(model, "clip", None), nn.Module) and {"visual_output", "video_mask"} <= logits:
        if {"video", "unified_visual_prompt", "video_mask"} <= visual and hasattr(model, "video_frames"):
            return "stop"
        if {"video", "video_mask", "shaped", "video_frame"} <= visual:
            return "clip4clip"
    found = [f"{name}({', '.join(sorted(taken))})" for name, taken in named.items() if taken]
    raise TypeError(
        "model: expected a CLIP4Clip or STOP model with a clip and their get_visual_output and get_similarity_logits, "
        f"got {type(model).__name__} with {' and '.join(found) or 'none of them'}"
    )


def _parameters(model: nn.Module, name: str) -> set[str]:
    method = getattr(model, name, None)
    return set(inspect.signature(method).parameters) if callable(method) else set()


class CompressedVideo(NamedTuple):
    """Videos with K frames each, in the layout of the input.

    CLIP4Clip: `[b, pair, K, 1, C, H, W]` or flat `[b · pair · K, C, H, W]`; STOP: `[b, pair, K, C, H, W]`; float32.
    mask `[b · pair, K]` in the dtype of the input's mask, 0 = padding.
    """

    video: Tensor
    mask: Tensor


def attach(model: nn.Module, compressor: nn.Module | None = None) -> Attachment:
    """Attach a compressor to one instance of a CLIP4Clip or STOP model.

    Then `get_visual_output` compresses its input, and `get_similarity_logits` uses the mask of the visual output
    instead of the caller's. Training and evaluation loops need no change, also on several devices. The mask is encoded
    in the visual output: a missing frame has the same value in all its channels, even after the tensor is moved. The
    learned part is `model.vmemory`, which follows the model's training mode.

    Args:
        model: An unwrapped model; wrap it for distributed training afterwards.
        compressor: A `FrameSelector`, `FrameResampler` or `AdaptiveFrameResampler`, which works on pixels before the
            tower, or `TempMe(model.clip)`, which merges inside it (CLIP4Clip only). STOP's tower takes exactly
            `model.video_frames` frames. None = the compressor of the `tempme_*` options in `model.task_config`, none
            without `use_tempme`.

    Returns:
        An `Attachment`.

    Raises:
        TypeError: `model` is neither CLIP4Clip nor STOP, or cannot merge inside its tower; or `compressor` is not a
            compressor.
        ValueError: `model.vmemory` exists; `compressor` merges in another model's tower or returns another number of
            frames than STOP takes; an option has an unknown value.

    Source: CLIP4Clip (arXiv 2104.08860); STOP (CVPR 2025); the TempMe and STOP integration, whose mask marks every
    compressed frame as existing.
    """
    kind = family(model)
    if hasattr(model, "vmemory") or _STATE in model.__dict__:
        raise ValueError("model: expected one without a vmemory of its own, detach what is attached first")
    if compressor is None:
        compressor = tempme_from_arguments(getattr(model, "task_config", None), model.clip)  # type: ignore[arg-type]
    if compressor is not None:
        _check_compressor(model, kind, compressor)
    attachment = Attachment(model, compressor)
    if compressor is not None:
        learned = compressor.positions if isinstance(compressor, TempMe) else compressor
        model.add_module("vmemory", learned.train(model.training))
        attachment.hook()
    return attachment


def _check_compressor(model: Any, kind: str, compressor: nn.Module) -> None:
    if isinstance(compressor, TempMe):
        if kind == "stop":
            raise TypeError(
                "compressor: expected a FrameSelector, FrameResampler or AdaptiveFrameResampler for STOP, whose tower "
                "puts prompts between the tokens of each frame, got TempMe"
            )
        own, other = vision_tower(model.clip)[0], compressor.tower
        if getattr(own, "visual", own) is not getattr(other, "visual", other):
            raise ValueError("compressor: expected a TempMe of the model's own tower, TempMe(model.clip)")
        return
    if not isinstance(compressor, nn.Module) or not callable(getattr(compressor, "count", None)):
        raise TypeError(f"compressor: expected a frame compressor or TempMe, got {type(compressor).__name__}")


class Attachment:
    """The handle of an attached compressor, a context manager that detaches on exit.

    Attributes:
        model: The model; a copy or replica has an attachment of its own, see `attachment`.
    """

    def __init__(self, model: nn.Module, compressor: nn.Module | None) -> None:
        self.model, self._given = model, compressor
        self.kind = family(model)
        self._enabled = True
        self._hooks: dict[str, _Method | _Replicate] = {}
        self._before: dict[str, Any] = {}

    def hook(self) -> None:
        for name in (*_INSTEAD, _REPLICATE):
            if name in self.model.__dict__:
                self._before[name] = self.model.__dict__[name]
        self._put()

    def _put(self) -> None:
        self._hooks = {name: _Method(self, name) for name in _INSTEAD} | {_REPLICATE: _Replicate(self)}
        self.model.__dict__.update(self._hooks)
        self.model.__dict__[_STATE] = self

    def moved(self, replica: nn.Module) -> None:
        """Attach the compressor to a replica of the model in the same way."""
        other = copy.copy(self)
        other.model = replica
        other._put()

    @property
    def compressor(self) -> nn.Module | None:
        """The compressor with the model's own weights, or None if nothing is attached."""
        if self._given is None or not self._hooks:
            return self._given
        model: Any = self.model
        learned: nn.Module = model.vmemory
        return self._given.inside(model.clip, learned) if isinstance(self._given, TempMe) else learned

    def detach(self) -> None:
        """Restore the original model; a second call has no effect.

        Raises:
            RuntimeError: A method was replaced again since, and this replacement would be lost.
        """
        for name, method in self._hooks.items():
            if self.model.__dict__.get(name) is not method:
                raise RuntimeError(
                    f"{name}: expected the method that attach put there, detach what came after it first"
                )
        for name in self._hooks:
            del self.model.__dict__[name]
        self.model.__dict__.update(self._before)
        if self._hooks:
            del self.model.__dict__[_STATE], self.model.vmemory
        self._hooks, self._before = {}, {}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the compressor within a context."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @property
    def enabled(self) -> bool:
        return self._enabled and self._given is not None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def original(self, name: str) -> Any:
        """Return an original method."""
        return self._before[name] if name in self._before else getattr(type(self.model), name).__get__(self.model)

    def compress(self, video: Any, video_mask: Any) -> CompressedVideo:
        """Compress a video as before the model's tower, for your own loop; the model is not changed.

        Args:
            video: The model's input: `[b, pair, T, 1, C, H, W]` or flat `[b · pair · T, C, H, W]` for CLIP4Clip,
                `[b, pair, T, C, H, W]` for STOP; any type that `torch.as_tensor` accepts.
            video_mask: `[b, pair, T]` or `[b · pair, T]`, not 0 where a frame exists; any dtype.

        Raises:
            TypeError: The compressor is a TempMe, which merges inside the tower and returns no shorter video.
            ValueError: Shapes do not fit each other or the compressor, or the tower takes another number of frames.
        """
        if isinstance(self.compressor, TempMe):
            raise TypeError("compressor: expected one of frames, got TempMe, which merges inside the tower")
        video = torch.as_tensor(video).float()
        frames, exists = _frames(video, video_mask)
        if self.compressor is None:
            return CompressedVideo(video, video_mask.reshape(exists.shape))
        made: int = self.compressor.count(frames.shape[1])  # type: ignore[operator]
        if self.kind == "stop" and made != self.model.video_frames:
            raise ValueError(
                f"video: expected frames of which the compressor makes {self.model.video_frames}, which is what STOP's "
                f"tower takes, got {frames.shape[1]} frames, of which it makes {made}"
            )
        out = self.compressor(frames, exists)
        if video.dim() == 4:
            kept = out.frames.flatten(0, 1)
        else:
            kept = out.frames.reshape(*video.shape[:2], made, *(1,) * (video.dim() - 6), *video.shape[-3:])
        return CompressedVideo(kept, out.mask.to(video_mask.dtype))


def attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, for example of a copy, or None."""
    return model.__dict__.get(_STATE)


def _frames(video: Tensor, video_mask: Any) -> tuple[Tensor, Tensor]:
    """Return frames `[B, T, C, H, W]` and their mask, `[B, T]` bool."""
    if not isinstance(video_mask, Tensor) or video_mask.dim() < 2:
        got = list(video_mask.shape) if isinstance(video_mask, Tensor) else type(video_mask).__name__
        raise ValueError(f"video_mask: expected a tensor [b, pair, T] or [B, T], got {got}")
    exists = video_mask.reshape(-1, video_mask.shape[-1]) != 0
    B, T = exists.shape
    if video.dim() not in (4, 6, 7) or video.shape[:-3].numel() != B * T:
        raise ValueError(
            f"video: expected frames for a video_mask of {B} videos of {T} frames, got shape {list(video.shape)}"
        )
    return video.reshape(B, T, *video.shape[-3:]), exists


def _merged(merging: TempMe, video: Tensor, video_mask: Any) -> tuple[Tensor, Tensor]:
    """Return embeddings of frames `[B, T, E]` and their mask."""
    frames, exists = _frames(video, video_mask)
    embedded = merging(frames, exists).frames
    return embedded.float(), exists.to(video_mask.dtype)


def _marked(visual: Tensor, mask: Tensor) -> Tensor:
    """Set missing frames of `[B, K, D]` to 1 in all channels; the model's masks exclude them.

    After a move, cast, slice or normalisation such a frame still has one value in all channels. A frame of zeros would
    become NaN in a division by the norm, which no mask removes.
    """
    return visual.masked_fill((mask == 0)[..., None], 1)


def _mask_of(visual: Tensor) -> Tensor:
    """Return `[B, K]` bool, the existing frames of a visual output."""
    return (visual != visual[..., :1]).any(-1)


def _get_visual_output(state: Attachment, original: Any, call: inspect.BoundArguments) -> Tensor:
    given, compressor = call.arguments, state.compressor
    mask = given.get("video_mask")
    if isinstance(compressor, TempMe):
        return _marked(*_merged(compressor, torch.as_tensor(given["video"]).float(), mask))
    given["video"], mask = state.compress(given["video"], mask)
    given |= {"video_mask": mask, "video_frame": mask.shape[1]}
    visual: Tensor = original(*call.args, **call.kwargs)
    # STOP returns one vector per video
    return visual if state.kind == "stop" else _marked(visual, mask)


def _get_similarity_logits(state: Attachment, original: Any, call: inspect.BoundArguments) -> Any:
    visual, mask = call.arguments["visual_output"], call.arguments["video_mask"]
    if state.kind == "clip4clip":
        T, compressor = mask.shape[-1], state.compressor
        made: int = T if isinstance(compressor, TempMe) else compressor.count(T)  # type: ignore[operator, union-attr]
        if visual.dim() != 3 or visual.shape[1] != made:
            raise ValueError(
                f"visual_output: expected what get_visual_output makes of {T} frames, [B, {made}, D], got "
                f"shape {list(visual.shape)}; within disabled() the video_mask given counts"
            )
        call.arguments["video_mask"] = _mask_of(visual).to(mask.dtype)
    return original(*call.args, **call.kwargs)


_REPLICATE = "_replicate_for_data_parallel"
_INSTEAD = {"get_visual_output": _get_visual_output, "get_similarity_logits": _get_similarity_logits}


class _Method:
    """A replacement for a method of one model, with the same arguments.

    A bound function would be pickled as the attribute of its name, which is the method it replaces.
    """

    def __init__(self, state: Attachment, name: str) -> None:
        self.state, self.name = state, name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.state.original(self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.state.original(self.name)
        if not self.state.enabled:
            return original(*args, **kwargs)
        return _INSTEAD[self.name](self.state, original, inspect.signature(original).bind(*args, **kwargs))


class _Replicate:
    """A function that makes replicas for `torch.nn.parallel.replicate`, with replaced methods of their own."""

    def __init__(self, state: Attachment) -> None:
        self.state = state

    def __call__(self) -> nn.Module:
        replica: nn.Module = self.state.original(_REPLICATE)()
        self.state.moved(replica)
        return replica
