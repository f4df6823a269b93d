"""Encode the token grids of a whole video once, and cache them on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vmemory._files import cache_dir, replacing, sha256_of
from vmemory.encoders import FrameEncoder
from vmemory.sources import Frame, FrameSource, SourceError


class Features(NamedTuple):
    """Tokens `[N, h, w, D]` float16 of a video, times `[N]` float64 in seconds, and the source's warning if damaged."""

    tokens: Tensor
    time: Tensor
    warning: str | None

    def pooled(self) -> Tensor:
        """Return the mean token of each frame, `[N, D]` float32."""
        return self.tokens.mean((1, 2), dtype=torch.float32)


def video_features(
    path: str | Path,
    encoder: FrameEncoder,
    fps: float | None = None,
    *,
    start: float = 0.0,
    stop: float | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Features:
    """Encode the frames of a video file, or read them from the cache.

    The cache holds one safetensors file for each content of the file (SHA-256), sampling and encoder. At 81
    tokens of 1,280 channels a frame takes 207 kB. The whole result is in memory while it is encoded.

    Args:
        path: a video file.
        encoder: its `name` is part of the cache key.
        fps, start, stop: see `FrameSource`.
        cache: cache directory; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.
        progress: show a progress bar on stderr.

    Raises:
        SourceError: the file is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    key = json.dumps([sha256_of(path), fps, start, stop, encoder.name, encoder.frame_size])
    folder = cache_dir(cache) / "features"
    stored = folder / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if stored.is_file():
        return _load(stored)
    source = FrameSource(path, fps, start, stop, size=encoder.frame_size)
    tokens: list[Tensor] = []
    times: list[float] = []
    for batch in _batches(source, encoder.batch_size, progress):
        tokens.append(encoder.encode([frame.image for frame in batch]).half())
        times.extend(frame.time for frame in batch)
    features = Features(torch.cat(tokens), torch.tensor(times, dtype=torch.float64), source.warning)
    folder.mkdir(exist_ok=True)
    _save(features, stored)
    return features


def _batches(source: FrameSource, size: int, progress: bool) -> Iterator[list[Frame]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("encoding {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(Path(source.name).name, total=source.expected)
        frames = iter(source)
        while batch := list(islice(frames, size)):
            yield batch
            bar.advance(task, len(batch))


def _save(features: Features, path: Path) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {"tokens": features.tokens, "time": features.time},
            temporary,
            {} if features.warning is None else {"warning": features.warning},
        )


def _load(path: Path) -> Features:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        warning = (file.metadata() or {}).get("warning")
        return Features(file.get_tensor("tokens"), file.get_tensor("time"), warning)
