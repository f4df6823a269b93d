"""`VideoSearch`: push the frames of a video into a bounded memory, and find moments by questions."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmemory.banks import BankFileError, Memory, load
from vmemory.banks.results import Entries
from vmemory.ops.similarity_topk import MAX_K
from vmemory.search.checkpoint import check_notes, check_times
from vmemory.search.encoder import Encoder
from vmemory.search.similar import Found, centred_search, spread
from vmemory.search.thumbnails import Thumbnails
from vmemory.search.trace import Trace
from vmemory.sources.video import Frame


class Answer(NamedTuple):
    """A moment found for a question.

    time, start, stop: seconds of the entry and of the span merged into it; score: cosine; level: tier; frame: number of
    its (first) frame; thumbnail: JPEG or None; concepts: names of the nearest classes with probabilities.
    """

    time: float
    start: float
    stop: float
    score: float
    level: int
    frame: int
    thumbnail: bytes | None
    concepts: tuple[tuple[str, float], ...]


class History(NamedTuple):
    """The entry and tier of each frame of a stream, one row per frame; evenly thinned after 65,536 frames.

    frame `[n]` int64 number; time `[n]` seconds; entry `[n]` int64 index into `entries()`, −1 = no longer held; level
    `[n]` int64 tier, −1 likewise; nbytes `[n]` bytes in use just after the frame came.
    """

    frame: np.ndarray
    time: np.ndarray
    entry: np.ndarray
    level: np.ndarray
    nbytes: np.ndarray


class Latency(NamedTuple):
    """Seconds spent so far in encoding frames, updating the memory, and making thumbnails."""

    frames: int
    encode: float
    memory: float
    thumbnails: float


_NUMBER, _TIME, _NBYTES = range(3)


class VideoSearch:
    """Encoder, memory and thumbnails of one video.

    Args:
        encoder: Encodes frames to tokens, and sentences to vectors comparable with them.
        bank: A memory of one stream for tokens of the encoder's shape; similarity must use all channels. Both memories
            of a `DualMemory` are searched.
        thumbnails: Keep a small JPEG for each entry.
        origin: `[D]` float32 that is subtracted from every token, see `calibrate`; None = nothing.
        facts: Plain values stored with the memory, for example the video's name.

    Raises:
        ValueError: The bank has several streams, or ignores channels; the origin does not fit.
    """

    def __init__(
        self,
        encoder: Encoder,
        bank: Memory,
        thumbnails: bool = True,
        *,
        origin: Tensor | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if bank.streams != 1:
            raise ValueError(f"bank: expected one stream, got {bank.streams}")
        dim = bank.dim
        if bank.key_dim != dim:
            raise ValueError(f"bank: expected key_dim = dim = {dim}, got {bank.key_dim}")
        if origin is not None and origin.shape != (dim,):
            raise ValueError(f"origin: expected shape [{dim}], got {list(origin.shape)}")
        self.encoder, self.bank = encoder, bank
        self.origin = None if origin is None else origin.float().cpu()
        self.thumbnails = Thumbnails() if thumbnails else None
        self.facts = dict(facts or {})
        self.latency = Latency(0, 0.0, 0.0, 0.0)
        self._trace = Trace(3)

    def push(self, frames: Sequence[Frame]) -> None:
        """Encode and push frames, oldest first, with times after those of earlier frames.

        Raises:
            ValueError: Times do not increase, or the tokens do not fit the bank; nothing has changed.
        """
        if not frames:
            return
        number = self.bank.counts()["seen"]
        images, times = [frame.image for frame in frames], [frame.time for frame in frames]
        started = clock.perf_counter()
        tokens = self.encoder.encode(images)
        encoded = clock.perf_counter()
        device = self.bank.entry.device
        if self.origin is not None:
            tokens = tokens - self.origin
        tokens = tokens.to(device, self.bank.token_dtype or tokens.dtype)
        self.bank.push(tokens, torch.tensor(times, dtype=torch.float64, device=device))
        if device.type == "cuda":
            # a push only queues work, whose time would otherwise be counted for the thumbnails
            torch.cuda.synchronize(device)
        pushed = clock.perf_counter()
        nbytes = float(self.bytes_in_use)
        numbers = range(number, number + len(frames))
        for n, t in zip(numbers, times, strict=True):
            self._trace.append(n, t, nbytes)
        if self.thumbnails is not None:
            self._keep_thumbnails(self.thumbnails, numbers, times, images)
        seen, encode, memory, pictures = self.latency
        self.latency = Latency(
            seen + len(frames),
            encode + encoded - started,
            memory + pushed - encoded,
            pictures + clock.perf_counter() - pushed,
        )

    def _keep_thumbnails(
        self, thumbnails: Thumbnails, numbers: Sequence[int], times: Sequence[float], images: Sequence[np.ndarray]
    ) -> None:
        held = self.bank.entries()
        spans = (x.cpu().numpy() for x in (held.first, held.last, held.time))
        thumbnails.update(numbers, times, images, *spans)

    @property
    def bytes_in_use(self) -> int:
        """Return the bytes that entries occupy, of the `bank.nbytes` that are always allocated."""
        return self.bank.bytes_in_use()

    @property
    def entries(self) -> Entries:
        """Return the entries held, in stream order."""
        return self.bank.entries()

    # asking

    def ask(self, text: str, k: int = 5, *, apart: float = 0.0) -> list[Answer]:
        """Find the moments most similar to a sentence.

        The encoder's `joint` maps each entry's mean token to the space of sentences. The cosine is computed after
        subtracting the mean of the entries from the entries, not from the sentence.

        Args:
            text: The sentence.
            k: Largest number of answers, 1 to 1024.
            apart: Least distance in seconds of an answer from every better one.

        Raises:
            ValueError: The sentence is empty.
        """
        if not text.strip():
            raise ValueError(f"text: expected a sentence, got {text!r}")
        entries = self.entries
        if len(entries.frame) == 0:
            return []
        joint = self.encoder.joint(self.pooled(entries))
        return self._answers(entries, self.encoder.text(text)[None], joint, k, apart, centre=False)

    def find(self, image: np.ndarray, k: int = 5, *, apart: float = 0.0) -> list[Answer]:
        """Find the moments most similar to a picture, uint8 RGB `[H, W, 3]`, by mean tokens about the entries' mean."""
        entries = self.entries
        if len(entries.frame) == 0:
            return []
        query = self.encoder.encode([image]).mean((1, 2))
        return self._answers(entries, query, self.pooled(entries), k, apart, centre=True)

    def pooled(self, entries: Entries) -> Tensor:
        """Return the mean token of each entry, with the origin added, `[n, D]` float32 on the CPU."""
        mean = entries.descriptor.float().cpu()
        return mean if self.origin is None else mean + self.origin

    def _answers(
        self, entries: Entries, query: Tensor, keys: Tensor, k: int, apart: float, *, centre: bool
    ) -> list[Answer]:
        count = min(len(entries.frame), MAX_K) if apart > 0 else k
        found = spread(centred_search(query, keys, count, centre_queries=centre), entries.time, k, apart)
        return self.describe(entries, found)

    def describe(self, entries: Entries, found: Found) -> list[Answer]:
        """Return answers for one query's search results."""
        chosen = found.entry[0]
        concepts = self.encoder.concepts(self.pooled(entries)[chosen], 3) if len(chosen) else []
        return [
            Answer(
                time=float(entries.time[i]),
                start=float(entries.start[i]),
                stop=float(entries.stop[i]),
                score=score,
                level=int(entries.level[i]),
                frame=int(entries.frame[i]),
                thumbnail=self.thumbnail(entries, i),
                concepts=tuple((name, p) for name, p in names),
            )
            for i, score, names in zip(chosen.tolist(), found.values[0].tolist(), concepts, strict=True)
        ]

    def thumbnail(self, entries: Entries, i: int) -> bytes | None:
        """Return the JPEG of an entry, or None."""
        if self.thumbnails is None:
            return None
        return self.thumbnails.of(int(entries.first[i]), int(entries.last[i]))

    @property
    def history(self) -> History:
        """Return the entry and tier of each frame seen."""
        entries, rows = self.entries, self._trace.rows
        number = rows[:, _NUMBER].astype(np.int64)
        first, last, level = (t.cpu().numpy() for t in (entries.first, entries.last, entries.level))
        index = np.searchsorted(first, number, "right") - 1
        inside = index >= 0
        inside[inside] = number[inside] <= last[index[inside]]
        index = np.where(inside, index, -1)
        found = np.where(inside, level[index] if len(level) else -1, -1)
        return History(number, rows[:, _TIME], index, found, rows[:, _NBYTES])

    # keeping

    def save(self, path: str | Path) -> None:
        """Write memory, thumbnails, history and facts to a `.vmem` file, which `load` reads without the video."""
        extra = {"trace": torch.from_numpy(self._trace.rows)}
        if self.origin is not None:
            extra["origin"] = self.origin
        if self.thumbnails is not None:
            extra |= {f"thumbnails.{name}": t for name, t in self.thumbnails.tensors().items()}
        notes = {
            "encoder": self.encoder.name,
            "facts": self.facts,
            "latency": list(self.latency),
            "trace": [self._trace.seen, self._trace.stride],
        }
        self.bank.save(path, extra=extra, notes=notes)

    @classmethod
    def load(cls, path: str | Path, encoder: Callable[[str], Encoder]) -> VideoSearch:
        """Load a search that `save` wrote; it answers questions and accepts further frames.

        Args:
            encoder: A function that returns the encoder for the name in the file.

        Raises:
            BankFileError: The file cannot be used, or was not written by a video search; one line says why.
        """
        bank, file = load(path)
        notes = file.notes
        if not {"encoder", "facts", "latency", "trace"} <= notes.keys():
            raise BankFileError(f"{path}: a memory without a video stream (written by Bank.save)")
        try:
            check_notes(notes, file.extra, bank.dim)
            entries = bank.entries()
            check_times(entries.time, entries.start, entries.stop)
        except ValueError as error:
            raise BankFileError(f"{path}: {error}") from None
        pictures = {name.partition(".")[2]: t for name, t in file.extra.items() if name.startswith("thumbnails.")}
        stream = cls(
            encoder(notes["encoder"]), bank, bool(pictures), origin=file.extra.get("origin"), facts=notes["facts"]
        )
        if stream.thumbnails is not None:
            stream.thumbnails.restore(pictures)
        stream.latency = Latency(*notes["latency"])
        stream._trace.restore(file.extra["trace"].numpy(), *notes["trace"])
        return stream
