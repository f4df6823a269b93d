"""The half of a session that takes frames in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmemory._attach import adapter_of, attached, base_of
from vmemory.banks import DualMemory, MemoryConfig
from vmemory.banks.lock import MemoryLock, locked
from vmemory.models.adapter import Clip, Inputs, device_of, dtype_of
from vmemory.ops._checks import check_choice, check_int
from vmemory.session.short_stream import Opening
from vmemory.sources.frames import as_frames, seconds_of


class Watching:
    """A stream of frames on its way through a model's vision tower into a memory; see `VideoSession`."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        memory: Any = None,
        config: Any = None,
        *,
        fps: float = 1.0,
        frame_size: tuple[int, int] | None = None,
        frame_tokens: int = 256,
        time_origin: str | float = "start",
        reuse_prefix: bool = True,
        gate: Callable[[Tensor, Any], Any] | None = None,
        on_push: Sequence[Callable[[Any], None]] = (),
    ) -> None:
        if isinstance(time_origin, str):
            check_choice("time_origin", time_origin, ("start", "oldest"))
        elif not math.isfinite(time_origin):
            raise ValueError(f"time_origin: expected 'start', 'oldest' or finite seconds, got {time_origin}")
        check_int("frame_tokens", frame_tokens, low=1)
        if not fps > 0:
            raise ValueError(f"fps: expected more than 0, got {fps}")
        self.model: Any = base_of(model)
        self.adapter, self.processor = adapter_of(self.model), processor
        self.config = MemoryConfig.of(getattr(self.model, "config", None) if config is None else config)
        self._configured = config is not None or isinstance(memory, str)
        if isinstance(memory, str):
            self.config, memory = MemoryConfig.of({**self.config.written(), "memory_policy": memory}), None
        makes = _is_maker(memory)
        self.memory: Any = None if makes else memory
        self._make: Any = memory if makes else None
        self.fps, self.frame_size, self.frame_tokens = fps, frame_size, frame_tokens
        self.time_origin, self.reuse_prefix = time_origin, reuse_prefix
        self.gate, self.on_push = gate, list(on_push)
        self.tower_calls = 0
        self._waiting: list[tuple[Tensor, float]] = []
        self._pair: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._frames, self._last = 0, -math.inf
        self._start: float | None = None
        self._grid: tuple[int, int] | None = None
        self._tail: Tensor | None = None
        self._output: Any = None
        self._pushes, self._step = 0, 0.0
        self._opening = Opening(self.config.max_frames_before_compression)
        self._prefix: tuple[Any, Any] | None = None
        # held by whatever reads or changes what the session has; not while the model writes an answer
        self._lock = MemoryLock()
        # why this session is no longer used, and where a pool keeps it on disk
        self._left: str | None = None
        self._home: Path | None = None

    @torch.no_grad()
    def push(self, frames: Any = None, time: Any = None, **inputs: Any) -> Watching:
        """Take frames in, oldest first.

        Args:
            frames: uint8 RGB `[n, 3, H, W]` or `[n, H, W, 3]`, pictures, arrays, or an iterable of `Frame` such as a
                `FrameSource`, whose frames are taken one by one until it ends. Where two frames become one of the
                memory, the last of an odd number waits for its pair; questions see it all the same, as if it came
                twice.
            time: Seconds of each frame, or of the only one, strictly increasing, by any clock; None = those the frames
                bring, or numbered by `fps`.
            inputs: Ready inputs of the tower instead, for example `pixel_values_videos=`, `video_grid_thw=`.

        Raises:
            TypeError, ValueError: Frames or times do not fit; nothing has changed then.
        """
        if (frames is None) == (not inputs):
            raise ValueError(
                "frames: expected frames or ready inputs, got " + ("neither" if frames is None else "both")
            )
        if frames is None:
            self._push_inputs(inputs, time)
            self._call()
            return self
        for pixels, seconds in as_frames(frames, time):
            if self._push(pixels, seconds):
                self._call()
        return self

    @locked
    def _push_inputs(self, inputs: Inputs, time: Any) -> None:
        self._check_here()
        if self._waiting:
            raise ValueError("inputs: expected no frame that waits for its pair before ready inputs, got one")
        given = None if time is None else seconds_of(time)
        taken = self._take(dict(inputs), given)
        together = self.adapter.frames_together(self.model)
        self._last = max([self._last, *taken])
        self._step = max(self._step, (together - 1) / self.fps)
        self._frames += len(taken) * together
        if self._start is None and taken:
            self._start = taken[0]

    def _check_here(self) -> None:
        if self._left is not None:
            raise RuntimeError(f"session: expected one in use, got one that {self._left}")

    def _seconds(self, i: int) -> float:
        return (self._frames + i) / self.fps

    @locked
    def _push(self, pixels: Tensor, given: list[float | None]) -> bool:
        """Take frames in; whether the memory has changed."""
        self._check_here()
        seconds = [self._seconds(i) if t is None else t for i, t in enumerate(given)]
        steps = [self._last, *seconds]
        if any(not a < b for a, b in pairwise(steps)):
            raise ValueError(f"time: expected strictly increasing seconds above {self._last}, got {seconds}")
        # a camera may have changed its size meanwhile
        waiting = [(_resized(frame, pixels), t) for frame, t in self._waiting]
        frames = [*waiting, *zip(pixels, seconds, strict=True)]
        together = self.adapter.frames_together(self.model)
        ready = len(frames) // together * together
        if ready:
            self._take(*self._prepared(frames[:ready]))
            times = [t for _, t in frames[:ready]]
            step = max(times[i + together - 1] - times[i] for i in range(0, ready, together))
            self._step = max(self._step, step)
        else:
            # a question now sees another last frame
            self._pushes += 1
        self._waiting, self._pair, self._last = frames[ready:], None, seconds[-1]
        self._frames += len(pixels)
        self._start = seconds[0] if self._start is None else self._start
        return ready > 0

    def _prepared(self, frames: list[tuple[Tensor, float]]) -> tuple[Inputs, list[float]]:
        """The tower's inputs of whole groups of frames, and the seconds of each group; the first ones fix the size."""
        stack, times = torch.stack([frame for frame, _ in frames]), [t for _, t in frames]
        together = self.adapter.frames_together(self.model)
        size = self.frame_size or self.adapter.frame_size(self.model, _size(stack), self.frame_tokens)
        inputs = self.adapter.prepare(self.model, stack, self.processor, size)
        self.frame_size = size
        groups = range(0, len(frames), together)
        return inputs, [self.adapter.frame_time(times[i], times[i + together - 1]) for i in groups]

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """The frame that waits for its pair is in the memory, as if it came twice, for as long as the block lasts."""
        if not self._waiting:
            yield
            return
        if self._pair is None:
            missing = self.adapter.frames_together(self.model) - len(self._waiting)
            inputs, seconds = self._prepared([*self._waiting, *self._waiting[-1:] * missing])
            clip, output = self._encoded(inputs)
            memory = self._fitting(clip)
            self._pair = self._chosen(clip, seconds)
            self._note(memory, clip, output)
        frames, times, valid = self._pair
        with self.memory.preserved(), self._opening.preserved():
            self.memory.push(frames, times, valid=valid)
            self._opening.push(frames, times, valid)
            yield

    def _call(self) -> None:
        # last of all and with nothing locked: a callback may ask, save or fail, and the push has happened
        for call in self.on_push:
            call(self)

    def _take(self, inputs: Inputs, seconds: list[float] | None) -> list[float]:
        """Encode and remember; the seconds of each frame of the memory."""
        clip, output = self._encoded(inputs)
        memory = self._fitting(clip)
        T = clip.frames.shape[0]
        if seconds is None:
            together = self.adapter.frames_together(self.model)
            seconds = [self._seconds(t * together) for t in range(T)]
        if len(seconds) != T:
            raise ValueError(f"time: expected {T} seconds, one for each frame of the memory, got {len(seconds)}")
        frames, times, valid = self._chosen(clip, seconds)
        memory.push(frames, times, valid=valid)
        self._opening.push(frames, times, valid)
        self._note(memory, clip, output)
        self._pushes += 1
        return seconds

    def _encoded(self, inputs: Inputs) -> tuple[Clip, Any]:
        clips, output = self.adapter.encode(self.model, self._moved(inputs))
        if len(clips) != 1:
            raise ValueError(f"inputs: expected one video, got {len(clips)}")
        self.tower_calls += 1
        return clips[0], output

    def _chosen(self, clip: Clip, seconds: list[float]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Frames, times and cells that exist, of those that the gate lets through."""
        times = torch.tensor(seconds, dtype=torch.float64)
        frames, valid = clip.frames, clip.valid
        if self.gate is not None:
            chosen = torch.as_tensor(self.gate(frames, self), device=frames.device).expand(len(frames))
            frames, times = frames[chosen], times[chosen.cpu()]
            valid = None if valid is None else valid[chosen]
        return frames.contiguous(), times, valid

    def _note(self, memory: Any, clip: Clip, output: Any) -> None:
        """What a prompt needs beside the memory."""
        self.memory, self._grid = memory, (clip.frames.shape[1], clip.frames.shape[2])
        self._tail, self._output = clip.tail, output

    def _moved(self, inputs: Inputs) -> Inputs:
        """Tensors where the model is, floats in its dtype."""
        device, dtype = device_of(self.model), dtype_of(self.model)
        return {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype) if torch.is_tensor(x) else x
            for name, x in inputs.items()
        }

    def _fitting(self, clip: Clip) -> Any:
        H, W, C = clip.frames.shape[1:]
        if self.memory is None:
            like: Inputs = {"device": clip.frames.device, "dtype": clip.frames.dtype, "key_dim": clip.key_dim}
            if self._make is not None:
                return self._make(dim=C, grid=(H, W), **like)
            handle, dual = attached(self.model), self.config.memory_policy == DualMemory.policy
            if handle is None or not isinstance(handle.given, DualMemory) or (self._configured and not dual):
                return self.config.make(C, (H, W), **like)
            # what was trained in the model is what watches the stream, in the dtype it was trained in
            like["dtype"] = torch.promote_types(clip.frames.dtype, handle.memory.working_tokens.dtype)
            if dual:
                settings = self.config
                asked = {
                    "capacities": settings.memory_capacities, "budget": settings.memory_budget,
                    "rule": settings.memory_rule, **settings.memory_options,
                }  # fmt: skip
                like |= {name: value for name, value in asked.items() if value is not None}
            return handle.memory.like((H, W), dim=C, **like)
        if self._grid is not None and self._grid != (H, W):
            raise ValueError(f"frames: expected a grid of {self._grid} tokens, as at the first push, got {(H, W)}")
        return self.memory


def _size(frames: Tensor) -> tuple[int, int]:
    return frames.shape[-2], frames.shape[-1]


def _resized(frame: Tensor, like: Tensor) -> Tensor:
    if _size(frame) == _size(like):
        return frame
    scaled = nn.functional.interpolate(frame[None].float(), _size(like), mode="bilinear", antialias=True)[0]
    return scaled.round().clamp(0, 255).to(frame.dtype)


def _is_maker(memory: Any) -> bool:
    if memory is None or all(hasattr(memory, name) for name in ("push", "read", "mass")):
        return False
    if isinstance(memory, nn.Module) or hasattr(memory, "compress") or not callable(memory):
        raise TypeError(f"memory: expected a policy's name, a bank, or a function that makes one, got {memory!r}")
    return True
