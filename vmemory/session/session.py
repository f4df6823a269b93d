"""A model that watches a stream: frames go in once, memory stays bounded, questions come at any time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vmemory.banks import MemoryTokens, Retrieved
from vmemory.banks.lock import MemoryLock, locked
from vmemory.models.adapter import Inputs, device_of, dtype_of
from vmemory.models.hook import generation_setting
from vmemory.models.stream_prompt import HeldFrame, held_frames, positions
from vmemory.models.turn import cache_argument, cache_in
from vmemory.session.keeping import Keeping

# of each model, held while it answers
_answers: WeakKeyDictionary[nn.Module, MemoryLock] = WeakKeyDictionary()

VideoIds = Callable[[Sequence[HeldFrame]], Tensor]


class VideoSession(Keeping):
    """One stream through one model: push frames, ask many times; nothing is encoded twice.

    A session holds the memory, at most one frame that waits for its pair, and with `reuse_prefix` the cache of the
    prompt up to the end of the video, made anew when a question follows new frames.

    Any call may come from any thread: calls on one session take turns, but frames come in while the model writes an
    answer, and sessions over one model answer one after the other.

    Args:
        model: Of a family in `integrations/`; it is not changed, and may have a memory attached or not.
        processor: Of the model: chat template, tokenizer and pixel statistics. None = ready inputs and ids alone.
        memory: A policy's name (`"merging"`), a `Bank` or `DualMemory` of one stream that fits the model's tokens, or a
            function that makes one from `dim`, `grid`, `key_dim`, `device` and `dtype`; None = what `config` says.
        config: As in `vmemory.attach`.
        fps: Frames a second of frames that come without times.
        frame_size: (H, W) that frames are scaled to; None = the first frame's, of at most `frame_tokens` tokens. It
            never changes: a memory holds tokens of one grid.
        frame_tokens: Tokens of a frame at most.
        time_origin: What counts as second 0 in a prompt, where positions and text tell times: `"start"`, the stream's
            first frame, whatever its clock says; or a second of that clock. With `"oldest"` positions count from the
            oldest entry held, which keeps them small for days, and text from the start. Everywhere else times are the
            clock's.
        reuse_prefix: Keep the prompt's cache between questions.
        gate: Called with the tokens `[T, H, W, C]` and the session before each update; a bool or `[T]` bool says which
            frames are remembered.
        on_push: Called with the session after each update.

    Raises:
        TypeError: `memory` is nothing of the above.
        ValueError: An unknown family or setting.
    """

    @property
    @locked
    @torch.no_grad()
    def held(self) -> MemoryTokens:
        """What is remembered now, with a frame that waits for its pair.

        Raises:
            ValueError: Nothing has been pushed.
        """
        with self._complete():
            if self.memory is None or self._grid is None:
                raise ValueError("session: expected frames before a question, got none")
            tokens: MemoryTokens = self._shown.read()
        return tokens

    @property
    def _shown(self) -> Any:
        return self.memory if self._opening.bank is None else self._opening.bank

    @property
    def num_tokens(self) -> int:
        """Visual tokens of what is remembered; a frame that waits for its pair has its own beside them in a prompt."""
        if self.memory is None or self._grid is None:
            return 0
        return int((self._shown.mass[0] > 0).sum()) + (0 if self._tail is None else len(self._tail))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory and its weights, an opening still shown whole, and what is kept between questions."""
        cache = 0 if self._prefix is None else _cache_bytes(self._prefix[1])
        cache += 0 if self._pair is None else sum(x.nbytes for x in self._pair if x is not None)
        if self.memory is None:
            return cache
        weights = sum(weight.nbytes for weight in self.memory.parameters())
        return cache + self._opening.nbytes + int(self.memory.nbytes) + weights

    @locked
    @torch.no_grad()
    def retrieve(self, query: Tensor, k: int = 5) -> Retrieved:
        """The entries most similar to each query, by cosine; see `Bank.retrieve`.

        Args:
            query: `[Q, D]`, in the space of the model's visual tokens.
            k: Entries a query; those below the setting `memory_similarity_threshold` are left out.

        Raises:
            ValueError: Nothing has been pushed, or the query's size does not fit.
        """
        with self._complete():
            if self.memory is None:
                raise ValueError("session: expected frames before a question, got none")
            found: Retrieved = self.memory.retrieve(query, k, threshold=self.config.memory_similarity_threshold)
        return found

    @locked
    @torch.no_grad()
    def prompt(
        self, text: str | None = None, *, input_ids: Tensor | None = None, video_ids: VideoIds | None = None
    ) -> Inputs:
        """Inputs for `model.generate`, for people with their own loop.

        Args:
            text: A question, put into the processor's chat template with the video in front.
            input_ids: `[1, L]` with one placeholder where the video belongs, instead of `text`.
            video_ids: With `input_ids`: ids that stand for the video, for families that write times between frames,
                made from the entries, whose seconds count from the origin; None = placeholders alone.

        Raises:
            ValueError: Nothing to ask about, no question, or times too far from their origin.
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
        places = int((ids == self.adapter.placeholder(self.model)).sum())
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
        placeholder = self.adapter.placeholder(self.model)
        if ids is not None:
            places = (ids[0] == placeholder).nonzero().flatten().tolist()
            if ids.dim() != 2 or len(ids) != 1 or len(places) != 1:
                raise ValueError(
                    f"input_ids: expected [1, L] with one {placeholder} where the video belongs, got {list(ids.shape)} "
                    f"with {len(places)}"
                )
            at = places[0]
            count = sum(len(h.cells) for h in held) + tail
            video = torch.full((count,), placeholder) if video_ids is None else video_ids(held)
            return torch.cat([ids[0, :at], video.to(ids), ids[0, at + 1 :]])[None]
        if self.processor is None:
            raise ValueError("processor: expected one for a question in words, got None")
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        content = [{"type": self.adapter.modality}, {"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        written: str = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        token = tokenizer.convert_ids_to_tokens(placeholder)
        if written.count(token) != 1:
            raise ValueError(f"processor: expected a chat template that writes {token!r} once, got {written!r}")
        video_text = self.adapter.video_text([(h.time, len(h.cells)) for h in held], token, tail)
        ids = tokenizer(written.replace(token, video_text), return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids

    @torch.no_grad()
    def ask(
        self,
        text: str | None = None,
        *,
        input_ids: Tensor | None = None,
        video_ids: VideoIds | None = None,
        **generation: Any,
    ) -> Any:
        """Answer a question about all that is remembered.

        Args:
            text, input_ids, video_ids: As in `prompt`.
            generation: Of `model.generate`.

        Returns:
            With `text` the answer in words, a list of them where `num_return_sequences` asks for several; else what
            `generate` returns, whose sequences hold the prompt.
        """
        return self._answer(*self._asked(text, input_ids, video_ids), text, generation)

    @locked
    def _asked(self, text: str | None, input_ids: Tensor | None, video_ids: VideoIds | None) -> tuple[Inputs, int]:
        return self.prompt(text, input_ids=input_ids, video_ids=video_ids), self._pushes

    @torch.no_grad()
    def _answer(self, inputs: Inputs, pushes: int, text: str | None, generation: dict[str, Any]) -> Any:
        length = inputs["input_ids"].shape[1]
        # a model keeps what belongs to its last prompt, so that it answers one question after the other; frames may be
        # pushed meanwhile
        with _answers.setdefault(self.model, MemoryLock()):
            if self.reuse_prefix and self._continues(generation):
                several = ("num_beams", "num_return_sequences")
                rows = max(generation_setting(self.model, generation, name) or 1 for name in several)
                inputs = self._continued(inputs, pushes, rows)
            out = self.model.generate(**inputs, **generation)
        if text is None:
            return out
        sequences = out if isinstance(out, Tensor) else out.sequences
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        answers = [tokenizer.decode(row[length:], skip_special_tokens=True) for row in sequences]
        return answers[0] if len(answers) == 1 else answers

    def stream_generate(self, text: str, **generation: Any) -> Iterator[str]:
        """The answer in pieces, as they come.

        Raises:
            ValueError: No processor; also what `ask` raises, when the first piece is asked for.
        """
        from transformers import TextIteratorStreamer

        if self.processor is None:
            raise ValueError("processor: expected one for a question in words, got None")
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        asked = self._asked(text, None, None)

        def answer() -> None:
            try:
                self._answer(*asked, text, {"streamer": streamer, **generation})
            except BaseException as error:  # handed to the caller's thread below
                failed.append(error)
                streamer.end()

        worker = Thread(target=answer, daemon=True)
        worker.start()
        yield from (piece for piece in streamer if piece)
        worker.join()
        if failed:
            raise failed[0]

    def _continues(self, generation: dict[str, Any]) -> bool:
        """Whether `generate` can go on from a cache: it makes none of another kind, and is given none."""
        plain = generation_setting(self.model, generation, "cache_implementation") is None
        cached = generation_setting(self.model, generation, "use_cache") is not False
        return plain and cached and cache_in(generation)[1] is None

    def _continued(self, inputs: Inputs, pushes: int, rows: int) -> Inputs:
        """The inputs on top of a cache of everything up to the video's end, filled when the memory has changed.

        Args:
            inputs: Of `prompt`.
            pushes: What the session had seen by then.
            rows: Copies of the cache that beams or several answers need.
        """
        ids = inputs["input_ids"]
        end = int((ids[0] == self.adapter.placeholder(self.model)).nonzero()[-1]) + 1
        key, prefix = (pushes, self.time_origin, ids[0, :end].tolist()), self._prefix
        if prefix is None or prefix[0] != key:
            cut = {name: x[..., :end] if torch.is_tensor(x) else x for name, x in inputs.items()}
            if "position_ids" in cut:
                cut["position_ids"] = cut["position_ids"][1:]
            prefix = self._prefix = (key, cache_in(self.model(**cut, use_cache=True))[1])
            if self._pushes != pushes:
                # another thread pushed or erased: what was true of the question is not kept for the next
                self._prefix = None
        if rows > 1 and not all(hasattr(layer, "batch_repeat_interleave") for layer in prefix[1].layers):
            # layers of linear attention are not copied
            return inputs
        rest = {name: x for name, x in inputs.items() if name != "mm_encoder_outputs"}
        places = rest.get("position_ids")
        if places is not None:
            # the model keeps this between calls: it has to be this prompt's
            self.adapter.located(self.model, places[1:, :, -1:].amax(0) + 1 - ids.shape[1])
        cache = copy.deepcopy(prefix[1])
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return {**rest, cache_argument(self.model): cache}


def _cache_bytes(cache: Any) -> int:
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)
