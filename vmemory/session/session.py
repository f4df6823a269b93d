"""`VideoSession`: push the frames of a stream once, within bounded memory, and ask questions at any time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypedDict, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vmemory._attach import adapter_of, attached, base_of
from vmemory.banks import BankFile, BankFileError, MemoryTokens, SearchResult, load
from vmemory.banks.config import ConfigLike, MemoryConfig
from vmemory.banks.lock import MemoryLock, locked
from vmemory.models.adapter import Clip, Inputs, device_of, dtype_of
from vmemory.models.hooks import generation_setting
from vmemory.models.memories import Memory, MemoryFactory, is_factory
from vmemory.ops._checks import check_choice, check_int
from vmemory.session.checkpoint import SessionNotes, frame_size
from vmemory.session.prefix import PromptPrefix
from vmemory.session.prompt import (
    HeldFrame,
    Processor,
    VideoIds,
    held_frames,
    ids_with_video,
    positions,
    text_ids,
    tokenizer_of,
)
from vmemory.session.short_stream import ShortStream
from vmemory.session.together import after_video, answer_together
from vmemory.session.tower import Tower
from vmemory.sources.frames import FramesLike, TimeLike, as_frames, seconds_of

if TYPE_CHECKING:
    from transformers.utils import ModelOutput
    from typing_extensions import Unpack

# one lock per model, held while it answers
_answers: WeakKeyDictionary[nn.Module, MemoryLock] = WeakKeyDictionary()


class SessionSettings(TypedDict, total=False):
    """Arguments of `VideoSession` that `VideoSession.load` passes on."""

    memory: str | Memory | MemoryFactory | None
    config: ConfigLike | None
    frame_tokens: int
    reuse_prefix: bool
    gate: Callable[[Tensor, VideoSession], bool | Tensor] | None
    on_push: Sequence[Callable[[VideoSession], object]]


class VideoSession:
    """One video stream with one model: push frames, ask any number of questions; no frame is encoded twice.

    A session holds the memory, at most one frame that waits for its pair, and with `reuse_prefix` the key-value cache
    of the prompt up to the end of the video, which is computed again after new frames.

    Any call may come from any thread: calls on one session take turns, but frames can be pushed while the model writes
    an answer. Sessions over one model answer one after the other.

    Args:
        model: A model of a family in `integrations/`. It is not changed, and may have an attached memory.
        processor: The model's processor: chat template, tokenizer and pixel statistics. None = only ready inputs and
            ids are accepted.
        memory: A policy's name (`"merging"`), a `Bank` or `DualMemory` of one stream that fits the model's tokens, or a
            function that makes one from `dim`, `grid`, `key_dim`, `device` and `dtype`; None = a memory made from
            `config`.
        config: As in `vmemory.attach`.
        fps: Frames per second of frames without times.
        frame_size: (H, W) to which frames are scaled; None = that of the first frame, reduced to at most `frame_tokens`
            tokens. It never changes, because a memory holds tokens of one grid.
        frame_tokens: Largest number of tokens per frame.
        time_origin: Second 0 in a prompt, where positions and text state times: `"start"`, the stream's first frame, or
            a second of the stream's clock. With `"oldest"` positions count from the oldest entry held, which keeps them
            small for days, and text counts from the start. Everywhere else times are those of the clock.
        reuse_prefix: Keep the prompt's key-value cache between questions.
        gate: Function of the tokens `[T, H, W, C]` and the session, called before each update; a bool or `[T]` bool
            selects the frames to push.
        on_push: Function of the session, called after each update.

    Attributes:
        memory: The memory; None until the first frames fix its size.
        tower: The vision tower, which sessions of a group share; `tower.calls` counts its calls.

    Raises:
        TypeError: `memory` is none of the above.
        ValueError: The family or a setting is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor | None = None,
        memory: str | Memory | MemoryFactory | None = None,
        config: ConfigLike | None = None,
        *,
        fps: float = 1.0,
        frame_size: tuple[int, int] | None = None,
        frame_tokens: int = 256,
        time_origin: str | float = "start",
        reuse_prefix: bool = True,
        gate: Callable[[Tensor, VideoSession], bool | Tensor] | None = None,
        on_push: Sequence[Callable[[VideoSession], object]] = (),
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
        named = {"memory_policy": memory} if isinstance(memory, str) else {}
        self.config = MemoryConfig.from_dict(getattr(self.model, "config", None) if config is None else config, **named)
        # without another setting, the memory attached to the model is used
        self._configured = config is not None or bool(named)
        self.memory: Memory | None = None
        self._factory: MemoryFactory | None = None
        if memory is not None and not isinstance(memory, str):
            if all(hasattr(memory, name) for name in ("push", "read", "mass")):
                self.memory = cast("Memory", memory)
            elif is_factory(memory):
                self._factory = memory
            else:
                raise TypeError(
                    f"memory: expected a policy's name, a bank, or a function that makes one, got {memory!r}"
                )
        given = self.memory is not None or self._factory is not None or self._trained() is not None
        self.fps, self.frame_size, self.frame_tokens = fps, frame_size, frame_tokens
        self.time_origin, self.reuse_prefix = time_origin, reuse_prefix
        self.gate, self.on_push = gate, list(on_push)
        self.tower = Tower(self.model, self.adapter, processor)
        self._waiting: list[tuple[Tensor, float]] = []
        self._pair: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._frames, self._last = 0, -math.inf
        self._start: float | None = None
        self._grid: tuple[int, int] | None = None
        self._tail: Tensor | None = None
        self._output: Any = None
        self._pushes, self._step = 0, 0.0
        self._short_stream = ShortStream(self.config.short_video(given))
        self._prefix = PromptPrefix(self.model, self.adapter)
        # held for every access to the session's data, but not while the model writes an answer
        self._lock = MemoryLock()
        # the reason why this session is no longer used, and its file in a pool
        self._left: str | None = None
        self._home: Path | None = None

    # frames come in

    @torch.no_grad()
    def push(self, frames: FramesLike | None = None, time: TimeLike | None = None, **inputs: Tensor) -> VideoSession:
        """Push frames, oldest first.

        Args:
            frames: uint8 RGB `[n, 3, H, W]` or `[n, H, W, 3]`, pictures, arrays, or an iterable of `Frame` such as a
                `FrameSource`, which is read to its end. If two frames form one frame of the memory, the last of an odd
                number waits for its pair; questions see it as if it were pushed twice.
            time: Seconds of each frame, or of the only one, strictly increasing, by any clock; None = the times of the
                frames themselves, or numbers divided by `fps`.
            inputs: Ready inputs of the tower instead, for example `pixel_values_videos=`, `video_grid_thw=`.

        Returns:
            The session itself.

        Raises:
            TypeError, ValueError: Frames or times do not fit; nothing has changed.
        """
        if (frames is None) == (not inputs):
            raise ValueError(
                "frames: expected frames or ready inputs, got " + ("neither" if frames is None else "both")
            )
        if frames is None:
            self._push_inputs(inputs, time)
            self._call_back()
            return self
        for pixels, seconds in as_frames(frames, time):
            if self._push_frames(pixels, seconds):
                self._call_back()
        return self

    @locked
    def _push_inputs(self, inputs: Inputs, time: TimeLike | None) -> None:
        self._check_here()
        if self._waiting:
            raise ValueError("inputs: expected no frame that waits for its pair before ready inputs, got one")
        given = None if time is None else seconds_of(time)
        clip, output = self.tower.inputs(inputs)
        together = self.adapter.temporal_patch_size(self.model)
        seconds = [self._numbered(t * together) for t in range(len(clip.frames))] if given is None else given
        self._remember(clip, output, seconds)
        self._last = max([self._last, *seconds])
        self._step = max(self._step, (together - 1) / self.fps)
        self._frames += len(seconds) * together
        if self._start is None and seconds:
            self._start = seconds[0]

    @locked
    def _push_frames(self, pixels: Tensor, given: list[float | None]) -> bool:
        """Push frames; return whether the memory has changed."""
        self._check_here()
        seconds = [self._numbered(i) if t is None else t for i, t in enumerate(given)]
        steps = [self._last, *seconds]
        if any(not a < b for a, b in pairwise(steps)):
            raise ValueError(f"time: expected strictly increasing seconds above {self._last}, got {seconds}")
        # a camera may change its frame size
        waiting = [(_resized(frame, pixels), t) for frame, t in self._waiting]
        frames = [*waiting, *zip(pixels, seconds, strict=True)]
        together = self.adapter.temporal_patch_size(self.model)
        ready = len(frames) // together * together
        if ready:
            self._remember(*self._encoded(frames[:ready]))
            times = [t for _, t in frames[:ready]]
            step = max(times[i + together - 1] - times[i] for i in range(0, ready, together))
            self._step = max(self._step, step)
        else:
            # the last frame of the prompt has changed
            self._pushes += 1
        self._waiting, self._pair, self._last = frames[ready:], None, seconds[-1]
        self._frames += len(pixels)
        self._start = seconds[0] if self._start is None else self._start
        return ready > 0

    def _check_here(self) -> None:
        if self._left is not None:
            raise RuntimeError(f"session: expected one in use, got one that {self._left}")

    def _numbered(self, i: int) -> float:
        """Return the seconds of the i-th of the next frames without times."""
        return (self._frames + i) / self.fps

    def _encoded(self, frames: list[tuple[Tensor, float]]) -> tuple[Clip, Any, list[float]]:
        """Encode complete groups of frames; return a clip, the tower's output, and seconds per group."""
        stack, times = torch.stack([frame for frame, _ in frames]), [t for _, t in frames]
        together = self.adapter.temporal_patch_size(self.model)
        size = self.frame_size or self.adapter.frame_size(self.model, _size(stack), self.frame_tokens)
        clip, output = self.tower.frames(stack, size)
        self.frame_size = size
        groups = range(0, len(frames), together)
        return clip, output, [self.adapter.frame_time(times[i], times[i + together - 1]) for i in groups]

    def _remember(self, clip: Clip, output: Any, seconds: list[float]) -> None:
        memory = self._fitting(clip)
        if len(seconds) != len(clip.frames):
            raise ValueError(
                f"time: expected {len(clip.frames)} seconds, one for each frame of the memory, got {len(seconds)}"
            )
        frames, times, mask = self._chosen(clip, seconds)
        memory.push(frames, times, mask=mask)
        self._short_stream.push(frames, times, mask)
        self._note(memory, clip, output)
        self._pushes += 1

    def _chosen(self, clip: Clip, seconds: list[float]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return frames, times and mask cells of the frames that the gate selects."""
        times = torch.tensor(seconds, dtype=torch.float64)
        frames, mask = clip.frames, clip.mask
        if self.gate is not None:
            chosen = torch.as_tensor(self.gate(frames, self), device=frames.device).expand(len(frames))
            frames, times = frames[chosen], times[chosen.cpu()]
            mask = None if mask is None else mask[chosen]
        return frames.contiguous(), times, mask

    def _note(self, memory: Memory, clip: Clip, output: Any) -> None:
        """Store the data that a prompt needs in addition to the memory."""
        self.memory, self._grid = memory, (clip.frames.shape[1], clip.frames.shape[2])
        self._tail, self._output = clip.tail, output

    def _fitting(self, clip: Clip) -> Memory:
        """Return the memory for these tokens; the first tokens determine its size."""
        H, W, C = clip.frames.shape[1:]
        if self.memory is not None:
            if self._grid is not None and self._grid != (H, W):
                raise ValueError(f"frames: expected a grid of {self._grid} tokens, as at the first push, got {(H, W)}")
            return self.memory
        like: Inputs = {"device": clip.frames.device, "dtype": clip.frames.dtype, "key_dim": clip.key_dim}
        if self._factory is not None:
            return self._factory(dim=C, grid=(H, W), **like)
        trained, config = self._trained(), self.config
        if trained is None:
            made: Memory = config.build(C, (H, W), **like)
            return made
        # a trained memory keeps the dtype of its training
        like["dtype"] = torch.promote_types(clip.frames.dtype, dtype_of(trained))
        if config.policy == "dual":
            asked = {
                "capacity": config.memory_capacities, "budget": config.memory_budget, "rule": config.memory_rule,
                **config.memory_options,
            }  # fmt: skip
            like |= {name: value for name, value in asked.items() if value is not None}
        copied: Memory = trained.like((H, W), dim=C, **like)
        return copied

    def _trained(self) -> Any:
        """Return the model's memory with weights if this session uses it, or None."""
        handle = attached(self.model)
        asked = self._configured and self.config.policy != "dual"
        return None if handle is None or asked or not hasattr(handle.memory, "like") else handle.memory

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """Push the frame that waits for its pair twice, and undo this at the end of the context."""
        if not self._waiting:
            yield
            return
        if self._pair is None:
            missing = self.adapter.temporal_patch_size(self.model) - len(self._waiting)
            clip, output, seconds = self._encoded([*self._waiting, *self._waiting[-1:] * missing])
            memory = self._fitting(clip)
            self._pair = self._chosen(clip, seconds)
            self._note(memory, clip, output)
        assert self.memory is not None
        frames, times, mask = self._pair
        with self.memory.preserved(), self._short_stream.preserved():
            self.memory.push(frames, times, mask=mask)
            self._short_stream.push(frames, times, mask)
            yield

    def _call_back(self) -> None:
        # at the end and without a lock, because a callback may ask, save or fail after the push
        for call in self.on_push:
            call(self)

    # what is remembered

    @property
    @locked
    @torch.no_grad()
    def held(self) -> MemoryTokens:
        """The tokens in memory, including a frame that waits for its pair.

        Raises:
            ValueError: Nothing has been pushed.
        """
        with self._complete():
            if self._shown is None or self._grid is None:
                raise ValueError("session: expected frames before a question, got none")
            tokens: MemoryTokens = self._shown.read()
        return tokens

    @property
    def _shown(self) -> Memory | None:
        return self.memory if self._short_stream.bank is None else self._short_stream.bank

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens in memory, without those of a frame that waits for its pair."""
        if self._shown is None or self._grid is None:
            return 0
        return int((self._shown.mass[0] > 0).sum()) + (0 if self._tail is None else len(self._tail))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory and its weights, of an uncompressed short stream, and of the prompt's cache."""
        cache = self._prefix.nbytes
        cache += 0 if self._pair is None else sum(x.nbytes for x in self._pair if x is not None)
        if self.memory is None:
            return cache
        weights = sum(weight.nbytes for weight in self.memory.parameters())
        return cache + self._short_stream.nbytes + self.memory.nbytes + weights

    @locked
    @torch.no_grad()
    def search(self, query: Tensor, k: int = 5) -> SearchResult:
        """Find the entries most similar to each query, by cosine; see `Bank.search`.

        Args:
            query: `[Q, D]`, in the space of the model's visual tokens.
            k: Entries per query; entries below the setting `memory_similarity_threshold` are left out.

        Raises:
            ValueError: Nothing has been pushed, or the query's size does not fit.
        """
        with self._complete():
            if self.memory is None:
                raise ValueError("session: expected frames before a question, got none")
            found: SearchResult = self.memory.search(query, k, threshold=self.config.memory_similarity_threshold)
        return found

    # questions

    @locked
    @torch.no_grad()
    def prompt(
        self, text: str | None = None, *, input_ids: Tensor | None = None, video_ids: VideoIds | None = None
    ) -> Inputs:
        """Return inputs for `model.generate`, for your own loop.

        Args:
            text: A question, written with the processor's chat template after the video.
            input_ids: `[1, L]` with one placeholder in the position of the video, instead of `text`.
            video_ids: With `input_ids`: a function that returns the ids of the video from its entries, whose seconds
                count from the origin, for families that write times between frames; None = placeholders only.

        Raises:
            ValueError: Nothing was pushed, there is no question, or times are too far from their origin.
        """
        self._check_here()
        if text is not None and not text.strip():
            raise ValueError("text: expected a question, got an empty one")
        memory = self.held
        if not len(memory.source):
            raise ValueError("session: expected frames before a question, got none that the gate let through")
        held = self._since_origin(held_frames(memory))
        ids = self._ids(text, input_ids, video_ids, held).to(device_of(self.model))
        assert self._grid is not None
        tokens = memory.tokens.to(dtype_of(self.model))
        if self._tail is not None:
            tokens = torch.cat([tokens, self._tail.to(tokens)])
        places = int((ids == self.adapter.placeholder_id(self.model)).sum())
        if places != len(tokens):
            raise ValueError(f"input_ids: expected {len(tokens)} placeholders for the memory's tokens, got {places}")
        features = {self.adapter.modality: self.adapter.pack(self._output, [tokens])}
        inputs: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": features}
        origin = held[0] if held and self.time_origin == "oldest" else None
        rows = positions(self.model, self.adapter, ids, held, self._grid, origin)
        return inputs if rows is None else {**inputs, "position_ids": rows}

    def _since_origin(self, held: list[HeldFrame]) -> list[HeldFrame]:
        start = self._start or 0.0
        zero = start if isinstance(self.time_origin, str) else float(self.time_origin)
        if held and held[0].time < zero:
            raise ValueError(f"time_origin: expected at most the oldest entry's second, {held[0].time}, got {zero}")
        return [frame._replace(time=frame.time - zero) for frame in held]

    def _ids(self, text: str | None, ids: Tensor | None, video_ids: VideoIds | None, held: list[HeldFrame]) -> Tensor:
        if (text is None) == (ids is None):
            raise ValueError("text: expected either text or input_ids")
        tail = 0 if self._tail is None else len(self._tail)
        if text is not None:
            return text_ids(self.model, self.adapter, self._processor(), text, held, tail)
        assert ids is not None
        placeholder = self.adapter.placeholder_id(self.model)
        count = sum(len(h.cells) for h in held) + tail
        video = torch.full((count,), placeholder) if video_ids is None else video_ids(held)
        return ids_with_video(ids, placeholder, video)

    def _processor(self) -> Processor:
        if self.processor is None:
            raise ValueError("processor: expected one for a question in words, got None")
        return self.processor

    @torch.no_grad()
    def ask(
        self,
        text: str | None = None,
        *,
        input_ids: Tensor | None = None,
        video_ids: VideoIds | None = None,
        **generation: object,
    ) -> str | list[str] | Tensor | ModelOutput:
        """Answer a question about the stream.

        Args:
            text, input_ids, video_ids: As in `prompt`.
            generation: Arguments of `model.generate`.

        Returns:
            With `text`, the answer as text, or a list of answers with `num_return_sequences`; otherwise the output of
            `generate`, whose sequences include the prompt.
        """
        return self._answer(*self._asked(text, input_ids, video_ids), text, generation)

    @torch.no_grad()
    def ask_all(self, texts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Answer several questions about the stream, each as if it were the only one, for the price of one prompt.

        The model reads the video once and writes all answers at the same time, greedily.

        Args:
            texts: The questions.
            max_new_tokens: Largest number of tokens of an answer.

        Returns:
            The answers, in the order of the questions.

        Raises:
            ValueError: As `ask`.
        """
        if not texts:
            return []
        check_int("max_new_tokens", max_new_tokens, low=1)
        for text in texts:
            if not text.strip():
                raise ValueError("text: expected a question, got an empty one")
        inputs, pushes = self._asked(texts[0], None, None)
        tails = [after_video(self.model, self.adapter, self._processor(), text) for text in texts]
        with _answers.setdefault(self.model, MemoryLock()):
            cache = self._prefix.cache(inputs, (pushes, self.time_origin), len(texts), lambda: self._pushes == pushes)
            if not self.reuse_prefix:
                self._prefix.clear()
            # a tokenizer may join text with the token before it
            plain = inputs["input_ids"][0, -len(tails[0]) :].tolist() == tails[0]
            rows = answer_together(self.model, inputs, tails, cache, max_new_tokens) if cache and plain else None
        if rows is None:
            return [str(self.ask(text, max_new_tokens=max_new_tokens, do_sample=False)) for text in texts]
        tokenizer = tokenizer_of(self._processor())
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def stream_generate(self, text: str, **generation: object) -> Iterator[str]:
        """Yield pieces of the answer while the model writes it.

        Raises:
            ValueError: No processor; the errors of `ask` are raised with the first piece.
        """
        from transformers import TextIteratorStreamer

        tokenizer = tokenizer_of(self._processor())
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        asked = self._asked(text, None, None)

        def answer() -> None:
            try:
                self._answer(*asked, text, {"streamer": streamer, **generation})
            except BaseException as error:  # raised again in the caller's thread below
                failed.append(error)
                streamer.end()

        worker = Thread(target=answer, daemon=True)
        worker.start()
        yield from (piece for piece in streamer if piece)
        worker.join()
        if failed:
            raise failed[0]

    @locked
    def _asked(self, text: str | None, input_ids: Tensor | None, video_ids: VideoIds | None) -> tuple[Inputs, int]:
        return self.prompt(text, input_ids=input_ids, video_ids=video_ids), self._pushes

    @torch.no_grad()
    def _answer(self, inputs: Inputs, pushes: int, text: str | None, generation: dict[str, Any]) -> Any:
        length = inputs["input_ids"].shape[1]
        # a model keeps data of its last prompt, so it answers questions one after the other; frames may be pushed
        # meanwhile
        with _answers.setdefault(self.model, MemoryLock()):
            if self.reuse_prefix and self._prefix.usable(generation):
                several = ("num_beams", "num_return_sequences")
                rows = max(generation_setting(self.model, generation, name) or 1 for name in several)
                seen = (pushes, self.time_origin)
                inputs = self._prefix.continued(inputs, seen, rows, lambda: self._pushes == pushes)
            out = self.model.generate(**inputs, **generation)
        if text is None:
            return out
        sequences = out if isinstance(out, Tensor) else out.sequences
        tokenizer = tokenizer_of(self._processor())
        answers = [tokenizer.decode(row[length:], skip_special_tokens=True) for row in sequences]
        return answers[0] if len(answers) == 1 else answers

    # forgetting

    @locked
    def reset(self) -> None:
        """Forget the stream, also in the pool's file; the sizes of memory and frames stay."""
        self._check_here()
        # the step that can fail comes first
        if self._home is not None:
            self._home.unlink(missing_ok=True)
        if self.memory is not None:
            self.memory.reset()
        self._short_stream.reset()
        self._prefix.clear()
        self._waiting, self._frames, self._last = [], 0, -math.inf
        self._pair = self._start = None
        self._pushes += 1

    @locked
    def erase(self, t0: float, t1: float, **how: bool) -> int:
        """Forget the frames from `t0` to `t1` seconds in memory, archive and the prompt's cache.

        The pool's file of the session is written again; other files of `save` are not changed. If two frames form one
        frame of the memory, it is erased if either frame is in the span (for ready inputs: two frames at a distance of
        1 / `fps`).

        Args:
            t0, t1: Seconds, both inclusive.
            how: Further arguments of the memory's `erase`.

        Returns:
            Entries removed from the memory.

        Raises:
            ValueError: `t0` is above `t1`, or the memory's `erase` does not have an argument; nothing has changed.
            RuntimeError: The archive cannot be written; see `Bank.erase`.
            OSError: The pool's file cannot be written and was deleted.
        """
        self._check_here()
        if not t0 <= t1:
            raise ValueError(f"t0: expected at most t1 ({t1} s), got {t0}")
        # an entry has one time, and its frames are within one step of it
        behind = self.adapter.frame_time(0.0, self._step)
        span = t0 - (self._step - behind), t1 + behind
        try:
            removed = 0 if self.memory is None else self.memory.erase(*span, **how)
        except RuntimeError:
            # an error of the archive's disk; the session's own data is erased all the same
            self._forget(span, t0, t1)
            raise
        self._forget(span, t0, t1)
        return removed

    def _forget(self, span: tuple[float, float], t0: float, t1: float) -> None:
        self._short_stream.erase(*span)
        self._waiting = [(frame, t) for frame, t in self._waiting if not t0 <= t <= t1]
        # a cache that is being computed must not be kept
        self._pushes += 1
        self._prefix.clear()
        self._pair = None
        if self._home is not None and self._home.exists():
            try:
                self.save(self._home)
            except BaseException:
                self._home.unlink(missing_ok=True)
                raise

    # files

    def save(self, path: str | Path) -> None:
        """Write the session to a `.vmem` file, from which `load` continues, including a frame that waits for its pair.

        The file is a consistent snapshot; other threads may push during the write.

        Raises:
            OSError: The file cannot be written; an old file is unchanged.
            ValueError: Nothing has been pushed.
        """
        self._to_file().write(Path(path))

    @locked
    def _to_file(self) -> BankFile:
        self._check_here()
        if self.memory is None or self._grid is None:
            raise ValueError("session: expected frames before saving, got none")
        extra, short_stream = self._short_stream.saved()
        if self._tail is not None:
            extra["tail"] = self._tail.clone()
        if self._waiting:
            extra["waiting"] = torch.stack([frame for frame, _ in self._waiting])
        notes = SessionNotes(
            frames=self._frames,
            last=self._last,
            fps=self.fps,
            frame_size=self.frame_size,
            grid=self._grid,
            time_origin=self.time_origin,
            waiting=tuple(t for _, t in self._waiting),
            step=self._step,
            short_stream=short_stream,
            start=self._start,
            model_type=self._model_type,
        )
        return self.memory.to_file(extra, {"session": notes._asdict()})

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, processor: Processor | None = None, **settings: Unpack[SessionSettings]
    ) -> VideoSession:
        """Load a session that `save` wrote, with the same model; encodes one blank frame to check the model.

        Args:
            path: The file.
            model, processor: As in `VideoSession`.
            settings: Further arguments of `VideoSession`; `fps`, `frame_size` and `time_origin` come from the file.

        Raises:
            BankFileError: The file cannot be used, or contains no session.
        """
        session = cls(model, processor, **settings)
        session.resume(path)
        return session

    def resume(self, path: str | Path) -> None:
        """Replace the content of this session by that of a file of `save`.

        Raises:
            BankFileError: As in `load`; nothing has changed.
        """
        device = device_of(self.model)
        memory, file = load(path, device)
        if "session" not in file.notes:
            raise BankFileError(f"{path}: contains a memory without a session")
        try:
            notes = SessionNotes.of(file.notes["session"])
            if notes.model_type != self._model_type:
                raise ValueError(
                    f"holds what a model of type {notes.model_type!r} saw, got one of type {self._model_type!r}"
                )
            waiting = notes.frames_waiting(file.extra, self.adapter.temporal_patch_size(self.model))
            short_stream = ShortStream.resumed(file.extra, notes.short_stream, device)
            output = self._checked(notes, memory, short_stream, file.extra)
        except ValueError as error:
            raise BankFileError(f"{path}: {error}") from None
        with self._lock:
            self._check_here()
            self.memory, self._grid, self._output, self._waiting = memory, notes.grid, output, waiting
            self._frames, self._last, self._tail = notes.frames, notes.last, file.extra.get("tail")
            self.fps, self.time_origin, self.frame_size = notes.fps, notes.time_origin, notes.frame_size
            self._step, self._short_stream = notes.step, short_stream
            self._start, self._pair = notes.start, None
            self._pushes += 1
            self._prefix.clear()

    @property
    def _model_type(self) -> str:
        return str(self.model.config.model_type)

    def _checked(self, notes: SessionNotes, memory: Memory, short: ShortStream, extra: dict[str, Tensor]) -> Any:
        """Check a session's parts against the tokens of a blank frame, and return the tower's output for it.

        Raises:
            ValueError: The parts are made for other tokens.
        """
        (H, W), D = memory.grid, memory.dim
        if memory.streams != 1 or notes.grid != (H, W):
            raise ValueError(f"session.grid: expected a memory of one stream and {notes.grid} tokens, got {(H, W)}")
        stop = memory.entries().stop
        if notes.waiting and len(stop) and notes.waiting[0] <= float(stop.max()):
            raise ValueError(f"session.waiting: expected seconds above {float(stop.max())}, got {notes.waiting}")
        size = frame_size(notes.frame_size or self.adapter.size_of(self.model, notes.grid))
        try:
            clip, output = self._blank(size)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"frame_size: {size} pixels do not go through this model ({error})") from error
        if tuple(clip.frames.shape[1:]) != (H, W, D):
            raise ValueError(f"session: expected tokens {list(clip.frames.shape[1:])} of this model, got {[H, W, D]}")
        if short.bank is not None and (short.bank.grid, short.bank.dim) != ((H, W), D):
            raise ValueError(f"short_stream: expected tokens {[H, W, D]}, got {[*short.bank.grid, short.bank.dim]}")
        want, got = (None if x is None else list(x.shape) for x in (clip.tail, extra.get("tail")))
        if want != got:
            raise ValueError(f"tail: expected {want}, got {got}")
        return output

    @torch.no_grad()
    def _blank(self, size: tuple[int, int]) -> tuple[Clip, Any]:
        """Return the tokens of a blank frame and the tower's output for it, whose form prompts copy."""
        frames = torch.zeros(self.adapter.temporal_patch_size(self.model), 3, *size, dtype=torch.uint8)
        clips, output = self.adapter.encode_frames(self.model, frames, self.processor, size)
        return clips[0], output

    # for a pool

    def kept_at(self, path: Path) -> None:
        """Set the pool's file of this session, so that `erase` and `reset` change it too."""
        self._home = path

    @locked
    def leave(self, why: str, *, keep: bool) -> None:
        """Close the session because its pool removes it; with `keep` write it first.

        Raises:
            OSError: The file cannot be written; the session stays open.
        """
        if keep and self._home is not None:
            self.save(self._home)
        self._left, self._home = why, None


def _size(frames: Tensor) -> tuple[int, int]:
    return frames.shape[-2], frames.shape[-1]


def _resized(frame: Tensor, like: Tensor) -> Tensor:
    if _size(frame) == _size(like):
        return frame
    scaled = nn.functional.interpolate(frame[None].float(), _size(like), mode="bilinear", antialias=True)[0]
    return scaled.round().clamp(0, 255).to(frame.dtype)
