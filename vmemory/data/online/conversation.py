"""Conversations over frames: which frames belong to which question, and the text that stands for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmemory.data.online.item import Box, Item, ItemError, Turn

_VIDEO, _IMAGE = "<video>", "<image>"
# seconds that a question may come after the last frame: the sampling has seen all there is by then
_LATE = 1.0


class Part(NamedTuple):
    """A turn with its frames: those from `first` on, up to `stop`, are new with it."""

    first: int
    stop: int
    time: float | None
    text: str
    answer: str


def tracking_turns(boxes: Sequence[Box], template: str, target: int) -> list[Turn]:
    """Ask for the boxes up to a frame, then for each later one."""
    line = [f"At {box.time:.1f}s, {list(box.box)}" for box in boxes]
    question = template.replace("<bbox>", str(list(boxes[target].box)))
    turns = [Turn(round(boxes[target].time, 1), question, "\n".join(line[: target + 1]))]
    later = range(target + 1, len(boxes))
    return turns + [Turn(round(boxes[i].time, 1), f"{_VIDEO}\n", line[i]) for i in later]


def parts_of(turns: Sequence[Turn], times: Sequence[float], end: float | None = None) -> list[Part]:
    """Assign to each question the frames that have come since the one before; without times the first has all.

    The original leaves the last frame of a video out; here it goes to the question that it precedes.

    Args:
        turns: In order of time.
        times: `[n]` seconds of the frames, increasing.
        end: Second at which the video ends, if known.

    Raises:
        ItemError: A question comes after the video's end.
    """
    parts: list[Part] = []
    first = 0
    for turn in turns:
        stop = len(times)
        if turn.time is not None:
            last = max(times[-1], end or 0.0)
            if turn.time > last + _LATE:
                raise ItemError(f"timestamps: expected them up to the video's end at {last:.1f} s, got {turn.time}")
            # times are compared as they are written: to a tenth of a second
            stop = next((i for i in range(first, len(times)) if round(times[i], 1) > turn.time + 1e-6), len(times))
        parts.append(Part(first, stop, turn.time, turn.text, turn.answer))
        first = stop
    return parts


def shifted(item: Item, turns: Sequence[Turn], times: Sequence[float]) -> tuple[list[Turn], list[float]]:
    """Make time begin with the first frame where an item asks for it, for frames and questions alike."""
    if not item.reset or not times:
        return list(turns), list(times)
    zero = times[0]
    moved = [turn if turn.time is None else turn._replace(time=max(0.0, round(turn.time - zero, 6))) for turn in turns]
    return moved, [round(time - zero, 6) for time in times]


def frame_tags(first: int, times: Sequence[float], tag: str = _IMAGE) -> str:
    """Write `Frame3 at 2.5s: <image>` for each frame, of which the first has number `first + 1`."""
    return "\n".join(f"Frame{first + i + 1} at {time:.1f}s: {tag}" for i, time in enumerate(times))


def tagged_text(part: Part, times: Sequence[float], timed: bool = True) -> str:
    """Write a question in VideoChat-Online's text form, with a line for each of its frames."""
    if timed:
        tags = frame_tags(part.first, times[part.first : part.stop])
    else:
        tags = "\n".join(f"Frame{i + 1}: {_IMAGE}" for i in range(part.first, part.stop))
    text = part.text.replace(_IMAGE, _VIDEO)
    return (text if _VIDEO in text else f"{_VIDEO}\n{text}").replace(_VIDEO, tags)


def plain_text(part: Part) -> str:
    """Return a question without the tags for its frames."""
    return part.text.replace(_IMAGE, "").replace(_VIDEO, "").strip()
