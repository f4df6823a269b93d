"""Worlds as files: videos, and the questions about them as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vmemory._files import replacing
from vmemory.data.world.items import make_items
from vmemory.data.world.state import World, check_whole


def make_worlds(
    folder: str | Path,
    items: int,
    *,
    seed: int = 0,
    seconds: int = 60,
    split: str = "train",
    questions: int = 12,
    fps: int = 1,
    pace: float = 1.0,
    done: Callable[[int], None] | None = None,
) -> Path:
    """Write videos and their questions; the same arguments write the same.

    `folder/videos/` holds a video a world, `folder/<split>.json` the items, two a world where a card stays long enough
    to be followed, and `folder/<split>_meta.json` what a dataset is made of. The items are written last.

    Args:
        folder: Made where it is missing. What it holds of the same split is replaced.
        items: Number of worlds, with seeds `seed`, `seed + 1`, …
        seed, seconds, split, pace: Of the worlds.
        questions: About each world, at most.
        fps: Frames a second of the videos. What there is to see changes once a second.
        done: Called with the number of worlds written.

    Returns:
        Path of `<split>_meta.json`.

    Raises:
        TypeError, ValueError: A bad argument.
        OSError: The folder cannot be written to.
    """
    # a bad argument is told before anything is written
    World(seed, seconds, split=split, pace=pace)
    check_whole("items", items, 1, 2**32 - seed)
    check_whole("questions", questions, 1, 10_000)
    check_whole("fps", fps, 1, 1000)
    folder = Path(folder)
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, Any]] = []
    for i in range(items):
        world = World(seed + i, seconds, split=split, pace=pace)
        name = f"{split}_{seconds}s_{world.seed:06}.mp4"
        write_video(videos / name, world, fps)
        made += make_items(world, name, count=questions)
        if done is not None:
            done(i + 1)
    with replacing(folder / f"{split}.json") as path:
        # an item a line
        path.write_text("[\n" + ",\n".join(json.dumps(item) for item in made) + "\n]\n")
    meta = folder / f"{split}_meta.json"
    sets = {f"world_{split}": {"annotation": f"{split}.json", "data_root": "videos", "repeat_time": 1}}
    with replacing(meta) as path:
        path.write_text(json.dumps(sets, indent=1))
    return meta


def write_video(path: Path, world: World, fps: int = 1) -> None:
    """Write a world as an H.264 video, with a frame at second 0."""
    import av

    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        options = {"crf": "10", "threads": "1", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for first in range(0, world.seconds * fps, 256):
            numbers = np.arange(first, min(first + 256, world.seconds * fps))
            pictures = world.render(numbers / fps)
            stream.width, stream.height = pictures.shape[2], pictures.shape[1]
            for number, picture in zip(numbers.tolist(), pictures, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
