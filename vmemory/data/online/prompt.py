"""Conversations over frames as a model's inputs and labels, through the model's own chat template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vmemory._attach import adapter_of, base_of
from vmemory.data.online.conversation import frame_tags
from vmemory.models.adapter import Inputs

IGNORED = -100


class Message(NamedTuple):
    """A question with the frames it brings, `[n, 3, h, w]` uint8 or None, and the answer to it.

    `first` is the number of the first of them. With `streamed` the token behind a frame is learned as well: behind the
    last frame the one that is written there, behind those in `silent` the one that ends a turn.
    """

    text: str
    answer: str
    frames: Tensor | None = None
    times: Sequence[float] = ()
    first: int = 0
    streamed: bool = False
    silent: Sequence[int] = ()


class PromptWriter:
    """Writes prompts and labels for one model.

    Ids are those that a `VideoSession` asks with. The loss is on what the assistant says, up to and with the token that
    ends its turn.

    Args:
        model: Of a family that `vmemory.attach` supports. It is looked at, not kept.
        tokenizer: Of the model, a fast one.
        processor: With the model's chat template and pixel statistics; None = the tokenizer's template.
        frame_tokens: Tokens of a frame at most, where the family lets frames have any size.

    Raises:
        ValueError: An unknown family, a slow tokenizer, or no chat template.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, processor: Any = None, frame_tokens: int = 256) -> None:
        inner = base_of(model)
        self.adapter = adapter_of(inner)
        # workers get what the adapter looks at, and not the weights
        self._model: Any = SimpleNamespace(config=inner.config)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.template = tokenizer if processor is None else processor
        self.frame_tokens = frame_tokens
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer: expected a fast one, which tells offsets, got {type(tokenizer).__name__}")
        if getattr(self.template, "chat_template", "") is None:
            raise ValueError("processor: expected one with a chat template, got none")
        self.placeholder = self.adapter.placeholder_id(inner)
        self.token: str = self.tokenizer.convert_ids_to_tokens(self.placeholder)
        self.together = self.adapter.temporal_patch_size(inner)
        self._arguments = set(inspect.signature(type(inner).forward).parameters)
        self._grid, self._tail = self._probed(model, processor)
        self._processor = processor

    def _probed(self, model: nn.Module, processor: Any) -> tuple[tuple[int, int] | None, int]:
        """Find the grid of tokens of a family whose frames have one size, and how many stand behind them."""
        if hasattr(self.adapter, "patch_size"):
            return None, 0
        size = self.adapter.frame_size(model, (64, 64), self.frame_tokens)
        with torch.no_grad():
            blank = torch.zeros(self.together, 3, *size, dtype=torch.uint8)
            clip = self.adapter.encode_frames(model, blank, processor, size).clips[0]
        return (clip.frames.shape[1], clip.frames.shape[2]), 0 if clip.tail is None else len(clip.tail)

    def frame_size(self, picture: np.ndarray) -> tuple[int, int]:
        """Return the (H, W) that pictures like this one are scaled to."""
        size: tuple[int, int] = self.adapter.frame_size(
            self._model, (picture.shape[0], picture.shape[1]), self.frame_tokens
        )
        return size

    def shrink(self, picture: np.ndarray) -> np.ndarray:
        """Scale a picture `[H, W, 3]` to the model's size, as a session does."""
        size = self.frame_size(picture)
        if picture.shape[:2] == size:
            return picture
        frame = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
        scaled = interpolate(frame, size, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
        return np.ascontiguousarray(scaled[0].to(torch.uint8).permute(1, 2, 0).numpy())

    def tokens_a_frame(self, size: tuple[int, int]) -> int:
        """Return the tokens of one frame of the memory, of a size (H, W)."""
        if self._grid is not None:
            return self._grid[0] * self._grid[1]
        unit = self.adapter.patch_size(self._model) * self.adapter.side  # type: ignore[attr-defined]
        return (size[0] // unit) * (size[1] // unit)

    def write(self, messages: Sequence[Message], system: str | None = None) -> Inputs:
        """Write one conversation.

        Returns:
            `input_ids`, `labels` and `attention_mask` `[L]`, and the inputs that hold the frames, as the model takes
            them for a batch of one.

        Raises:
            ValueError: The chat template does not write what a prompt needs.
        """
        chat: list[dict[str, Any]] = [] if system is None else [_said("system", [_text(system)])]
        pieces: list[str] = []
        before = ""
        for message in messages:
            content = [] if message.frames is None else [{"type": self.adapter.modality}]
            if message.text or not content:
                content.append(_text(message.text))
            chat.append(_said("user", content))
            asked = self._rendered(chat, before, answering=True)
            chat.append(_said("assistant", [_text(message.answer)]))
            answered = self._rendered(chat, asked, answering=False)
            pieces += [self._filled(asked[len(before) :], message), answered[len(asked) :]]
            before = answered
        encoded = self.tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        inputs: Inputs = {"input_ids": ids, "labels": self._labels(ids, encoded["offset_mapping"], pieces, messages)}
        inputs["attention_mask"] = torch.ones_like(ids)
        frames = [message for message in messages if message.frames is not None]
        if frames:
            inputs |= self._pixels(frames)
        if "mm_token_type_ids" in self._arguments:
            inputs["mm_token_type_ids"] = (ids == self.placeholder).int() * (
                1 if self.adapter.modality == "image" else 2
            )
        return inputs

    def _rendered(self, chat: list[dict[str, Any]], before: str, *, answering: bool) -> str:
        text: str = self.template.apply_chat_template(chat, tokenize=False, add_generation_prompt=answering)
        if not text.startswith(before):
            raise ValueError(
                f"processor: expected a chat template that goes on from what it wrote, {before[-60:]!r}, got "
                f"{text[: len(before)][-60:]!r}"
            )
        return text

    def _filled(self, written: str, message: Message) -> str:
        """Put the frames where a template has written one placeholder for all."""
        wanted = 0 if message.frames is None else 1
        if written.count(self.token) != wanted:
            raise ValueError(
                f"processor: expected a chat template that writes {self.token!r} {wanted} times, got {written!r}"
            )
        return written.replace(self.token, self._video_text(message)) if wanted else written

    def _video_text(self, message: Message) -> str:
        assert message.frames is not None
        count = self.tokens_a_frame((message.frames.shape[-2], message.frames.shape[-1]))
        if self.adapter.modality == "image":
            # families of pictures tell times as VideoChat-Online does
            return frame_tags(message.first, message.times, self.token * count)
        times = _groups(list(message.times), self.together)
        shown = [(self.adapter.frame_time(group[0], group[-1]), count) for group in times]
        return self.adapter.video_text(shown, self.token, self._tail)

    def _labels(
        self, ids: Tensor, offsets: Sequence[tuple[int, int]], pieces: Sequence[str], messages: Sequence[Message]
    ) -> Tensor:
        spans, at = [], 0
        for i, piece in enumerate(pieces):
            if i % 2:
                # what a template puts behind the token that ends a turn is not for the model to say
                spans.append((at, at + len(piece.rstrip())))
            at += len(piece)
        labels = torch.full_like(ids, IGNORED)
        token = 0
        for start, stop in spans:
            while token < len(offsets) and offsets[token][1] <= start:
                token += 1
            while token < len(offsets) and offsets[token][0] < stop:
                labels[token] = ids[token]
                token += 1
        if any(message.streamed for message in messages):
            self._silences(ids, labels, messages)
        return labels

    def _silences(self, ids: Tensor, labels: Tensor, messages: Sequence[Message]) -> None:
        """Label the tokens behind frames: speak, or be silent."""
        silence = self.tokenizer.eos_token_id
        if silence is None:
            raise ValueError("tokenizer: expected one with an eos_token, which means silence, got none")
        places = (ids == self.placeholder).nonzero().flatten().tolist()
        seen = 0
        for message in messages:
            if message.frames is None:
                continue
            count = self.tokens_a_frame((message.frames.shape[-2], message.frames.shape[-1]))
            frames = len(_groups(list(message.times), self.together))
            behind = [places[seen + (frame + 1) * count - 1] + 1 for frame in range(frames)]
            seen += frames * count + self._tail
            if message.streamed:
                labels[behind[-1]] = ids[behind[-1]]
                for frame in {frame // self.together for frame in message.silent} - {frames - 1}:
                    labels[behind[frame]] = silence

    def _pixels(self, messages: Sequence[Message]) -> Inputs:
        made: list[Inputs] = []
        steps = []
        for message in messages:
            assert message.frames is not None
            frames = message.frames
            missing = -len(frames) % self.together
            if missing:
                frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
            size = (frames.shape[-2], frames.shape[-1])
            # like adapters themselves, this needs no more of the model than its config
            made.append(self.adapter.preprocess(self._model, frames, self._processor, size))
            steps.append(_step(message.times) * self.together)
        inputs = join_inputs(made)
        for name in ("second_per_grid_ts", "video_second_per_grid"):
            if name in self._arguments:
                inputs[name] = torch.tensor(steps)
        return inputs


def join_inputs(made: Sequence[Inputs]) -> Inputs:
    """Put the inputs that hold frames behind each other.

    Raises:
        ValueError: The family takes videos of one number of frames, and there are several.
    """
    joined: Inputs = {}
    for name in made[0]:
        tensors = [inputs[name] for inputs in made]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            frames = sorted({tensor.shape[1] for tensor in tensors})
            raise ValueError(
                f"{name}: expected videos of one number of frames, which this family needs, got {frames}; with "
                "turns='apart' and a batch size of 1 there is one video"
            )
        joined[name] = torch.cat(tensors)
    return joined


def _said(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _groups(times: list[float], together: int) -> list[list[float]]:
    return [times[i : i + together] for i in range(0, len(times), together)]


def _step(times: Sequence[float]) -> float:
    """Return the seconds from a frame to the next, one where there is but one frame."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
