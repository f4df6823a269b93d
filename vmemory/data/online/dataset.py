"""Online video datasets: what was annotated, as a model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vmemory.data.online.conversation import Part, parts_of, plain_text, shifted, tracking_turns
from vmemory.data.online.item import Item, ItemError
from vmemory.data.online.prompt import Message, PromptWriter
from vmemory.data.online.reading import DataLike, Skipped, read_annotations
from vmemory.data.online.sampling import Sampled, rate_of, sample_pictures, sample_video, sample_world
from vmemory.models.adapter import Inputs
from vmemory.sources import FrameSource, SourceError

TURNS = ("together", "apart")


class OnlineVideoDataset(Dataset[Any]):
    """Conversations about videos whose turns have times, for training with or without a memory.

    Reads VideoChat-Online's, VideoLLaMA3's (standard and stream) and LLaVA's items. Videos are decoded when an item is
    asked for. What an item gives depends on the seed, the epoch and its place alone, so it is the same under any number
    of workers and after a restart.

    An item that cannot be used is left out and named in `skipped`; nothing takes its place. Errors in the annotations
    and missing files are found at once, damaged videos by `verify()` or when they are asked for: the item is then a
    `Skipped`, which `Collator` leaves out of its batch.

    Args:
        data_path: As for `read_annotations`.
        tokenizer: Of the model.
        processor: Of the model; None = the tokenizer has the chat template.
        model: The model, of a family that `vmemory.attach` supports; None = no inputs, just annotations.
        video_root: Folder that the videos of a single set are relative to.
        sampling_method: `"fps1"`, `"fps2"`, …, or `"middle"`.
        max_num_frame: Frames of a video at most.
        min_num_frame: Frames of a video at least, where it has as many: a short one is sampled more densely.
        max_seq_length: Tokens of an item at most; longer ones are left out. None = any.
        frame_tokens: Tokens of a frame at most.
        turns: `"together"`: a conversation is one prompt, each question behind the frames since the one before, as
            VideoChat-Online trains. `"apart"`: each question is a prompt of its own behind all frames so far, as a
            session with a memory asks.
        seed: Of what is drawn: a tracking item's first frame, and which silences of a stream count.

    Attributes:
        items: Those that can be used, as often as they are repeated.
        skipped: `Skipped` items found so far, with reasons.

    Raises:
        FileNotFoundError: There are no annotations at `data_path`.
        ValueError: They have another form, or a bad argument.
    """

    def __init__(
        self,
        data_path: DataLike,
        tokenizer: Any = None,
        processor: Any = None,
        *,
        model: nn.Module | None = None,
        video_root: str = "",
        sampling_method: str = "fps1",
        max_num_frame: int = 64,
        min_num_frame: int = 1,
        max_seq_length: int | None = None,
        frame_tokens: int = 256,
        turns: str = "together",
        seed: int = 0,
    ) -> None:
        if sampling_method != "middle":
            rate_of(sampling_method)
        if max_num_frame < 1:
            raise ValueError(f"max_num_frame: expected at least 1, got {max_num_frame}")
        if not 1 <= min_num_frame <= max_num_frame:
            raise ValueError(f"min_num_frame: expected 1 to max_num_frame {max_num_frame}, got {min_num_frame}")
        if turns not in TURNS:
            raise ValueError(f"turns: expected one of {', '.join(TURNS)}, got {turns!r}")
        self.writer = None if model is None else PromptWriter(model, tokenizer, processor, frame_tokens)
        self.sampling_method, self.max_seq_length = sampling_method, max_seq_length
        self.max_num_frame, self.min_num_frame = max_num_frame, min_num_frame
        self.turns, self.seed = turns, seed
        # workers live on between epochs, and look here
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.items, self.skipped = read_annotations(data_path, video_root)
        self._entries = self._listed()

    def _listed(self) -> list[tuple[int, int | None]]:
        """List items, and of each the question that is asked; None for all of them."""
        entries: list[tuple[int, int | None]] = []
        for i, item in enumerate(self.items):
            if self.turns == "together" or item.kind in ("stream", "text"):
                entries.append((i, None))
            elif item.kind == "tracking":
                entries.append((i, 0))
            else:
                # a turn without words asks for more of what the one before asked
                entries += [(i, k) for k, turn in enumerate(item.turns) if turn.text.replace("<video>", "").strip()]
        return entries

    def __len__(self) -> int:
        return len(self._entries)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew in an epoch; the same number draws the same."""
        self._epoch[0] = epoch

    def __getitem__(self, index: int) -> Inputs | Skipped:
        """Write the inputs and labels of an item, or tell why it cannot be used.

        Raises:
            ValueError: The dataset was made without a model, or the tokenizer's template cannot write a prompt.
        """
        if self.writer is None:
            raise ValueError("model: expected one, for which inputs are written, got None")
        number, question = self._entries[index]
        item = self.items[number]
        rng = np.random.RandomState([self.seed, int(self._epoch[0]), index])
        try:
            inputs = self._written(item, question, rng)
        except ItemError as error:
            return Skipped(item.name, str(error))
        length = len(inputs["input_ids"])
        if self.max_seq_length is not None and length > self.max_seq_length:
            return Skipped(item.name, f"max_seq_length: expected up to {self.max_seq_length} tokens, got {length}")
        return inputs

    def _written(self, item: Item, question: int | None, rng: np.random.RandomState) -> Inputs:
        assert self.writer is not None
        if item.kind == "text":
            return self.writer.write([Message(turn.text, turn.answer) for turn in item.turns], item.system)
        sampled, parts, times = self.parts(item, rng)
        frames = torch.stack([torch.from_numpy(np.ascontiguousarray(picture)) for picture in sampled.pictures])
        frames = frames.permute(0, 3, 1, 2)
        if question is not None:
            # as a session asks: all frames so far, then the question
            parts = [parts[question]._replace(first=0)]
        messages = [self._message(part, frames, times) for part in parts]
        if item.kind == "stream":
            messages = _with_silence(messages, rng)
        return self.writer.write(messages, item.system)

    def _message(self, part: Part, frames: Tensor, times: Sequence[float]) -> Message:
        shown = frames[part.first : part.stop] if part.stop > part.first else None
        return Message(plain_text(part), part.answer, shown, times[part.first : part.stop], part.first)

    def parts(self, item: Item, rng: np.random.RandomState) -> tuple[Sampled, list[Part], list[float]]:
        """Decode an item's frames, and give each of its questions those that belong to it.

        Returns:
            The frames, the questions, and the frames' seconds as the conversation counts them.

        Raises:
            ItemError: The item cannot be used.
        """
        shrink = None if self.writer is None else self.writer.shrink
        turns, boxes = item.turns, item.boxes
        if item.pictures:
            at = [box.time for box in boxes] if boxes else [float(i) for i in range(len(item.pictures))]
            sampled, taken = sample_pictures(item.pictures, at, self.max_num_frame, shrink)
            boxes = tuple(boxes[i] for i in taken) if boxes else ()
        elif item.world is not None:
            sampled = sample_world(item.world, self.sampling_method, self.max_num_frame, self.min_num_frame, shrink)
        else:
            assert item.video is not None
            frames = self.sampling_method, self.max_num_frame, self.min_num_frame
            sampled = sample_video(item.video, item.clip, *frames, shrink)
        if len({picture.shape for picture in sampled.pictures}) > 1:
            raise ItemError("image: expected pictures of one size, got several")
        if item.kind == "tracking":
            if item.reset:
                boxes = tuple(box._replace(time=round(box.time - boxes[0].time, 6)) for box in boxes)
            assert item.template is not None
            turns = tuple(tracking_turns(boxes, item.template, int(rng.randint(len(boxes)))))
            times = [box.time for box in boxes]
            return sampled, parts_of(turns, times), times
        end = sampled.end - (sampled.times[0] if item.reset else 0.0)
        moved, times = shifted(item, turns, sampled.times)
        return sampled, parts_of(moved, times, end), times

    @property
    def lengths(self) -> list[int]:
        """Estimated tokens of each item, without decoding: for grouping items of like length."""
        frame = self.writer.frame_tokens if self.writer is not None else 256
        return [self._length(self.items[number], question, frame) for number, question in self._entries]

    def _length(self, item: Item, question: int | None, frame: int) -> int:
        if item.length is not None and question is None:
            return item.length
        turns = item.turns if question is None else item.turns[question : question + 1]
        # four letters a token, as languages go
        words = sum(len(turn.text) + len(turn.answer) for turn in turns) // 4
        frames = self.max_num_frame
        if item.pictures:
            frames = min(frames, len(item.pictures))
        elif turns and turns[-1].time is not None and self.sampling_method != "middle":
            frames = min(frames, 1 + int(turns[-1].time * rate_of(self.sampling_method)))
        return words + (0 if item.kind == "text" else frames * frame)

    def verify(self, workers: int = 8) -> list[Skipped]:
        """Open every video once, and leave out the items of those that cannot be read.

        Returns:
            The items left out now.
        """
        paths = sorted({path for item in self.items for path in (item.video, *item.pictures) if path is not None})

        def problem(path: Any) -> str | None:
            try:
                FrameSource(path)
            except SourceError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(workers) as pool:
            found = dict(zip(paths, pool.map(problem, paths), strict=True))
        kept, left = [], {}
        for item in self.items:
            reasons = [found[path] for path in (item.video, *item.pictures) if path is not None and found[path]]
            if reasons:
                left[item.name] = Skipped(item.name, str(reasons[0]))
            else:
                kept.append(item)
        self.items = kept
        self._entries = self._listed()
        self.skipped += left.values()
        return list(left.values())

    def get_format_statistics(self) -> dict[str, Any]:
        """Count what the annotations hold."""
        items = self.items
        counts = [sum(turn.time is not None for turn in item.turns) for item in items]
        kinds = sorted({item.kind for item in items})
        sequences = [item for item in items if item.boxes]
        return {
            "total_samples": len(items),
            "format_type": "empty" if not items else kinds[0] if len(kinds) == 1 else "mixed",
            "has_timestamps": any(counts),
            "timestamp_count": sum(counts),
            "avg_timestamps_per_sample": sum(counts) / len(items) if items else 0.0,
            "max_timestamps_per_sample": max(counts, default=0),
            "min_timestamps_per_sample": min(counts, default=0),
            "has_image_sequences": bool(sequences),
            "image_sequence_count": len(sequences),
            "has_bboxes": any(item.boxes for item in items),
            "bbox_count": sum(len(item.boxes) for item in items),
            "skipped": len(self.skipped),
            "kinds": {kind: sum(item.kind == kind for item in items) for kind in kinds},
        }

    def summary(self) -> str:
        """Tell in one line how many items there are, and which were left out."""
        text = f"{len(self.items)} items"
        if self.skipped:
            first = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:3])
            more = f"; and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            text += f", {len(self.skipped)} left out ({first}{more})"
        return text


def create_dataset(data_path: DataLike, tokenizer: Any, processor: Any, **kwargs: Any) -> OnlineVideoDataset:
    """Make a dataset of items in any of the formats; `kwargs` are `OnlineVideoDataset`'s.

    Raises:
        ValueError: No item can be used, or a bad argument.
    """
    dataset = OnlineVideoDataset(data_path, tokenizer, processor, **kwargs)
    if not dataset.items:
        raise ValueError(f"data_path: expected items that can be used, got {dataset.summary()}")
    return dataset


def _with_silence(messages: Sequence[Message], rng: np.random.RandomState) -> list[Message]:
    """Select as many frames at which to be silent as there are at which to speak.

    Something is said behind the last frame of each message; nothing is, behind the others.
    """
    quiet = [(i, k) for i, message in enumerate(messages) for k in range(len(message.times) - 1)]
    order = rng.permutation(len(quiet))[: len(messages)].tolist()
    drawn = [quiet[i] for i in order]
    return [
        message._replace(streamed=True, silent=sorted(k for i, k in drawn if i == n))
        for n, message in enumerate(messages)
    ]
