"""Pick the frames of a stream at which something changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np

from vmemory.sources.video import Frame

KeyFrameRule = Literal["difference", "flow", "every"]

# frames that a frame is compared with: a minute at 4 a second
WINDOW = 240
# width and height of the pictures whose pixels are compared, and the width at which flow is computed
_SMALL, _FLOW_WIDTH = (32, 24), 160


class KeyFrames:
    """Iterable of the key frames of a stream, each as it came.

    A frame is a key frame if it changed more than all but a `share` of the frames of the last minute did. The threshold
    follows the stream and needs no number for it; nothing after the frame is looked at. The first frame is one, a
    picture that stands still never is. Each iteration has a state of its own.

    Args:
        frames: `Frame`s, from `FrameSource`, `LiveSource` or made by hand, of one size.
        rule: How change is measured. `"difference"`: mean absolute difference of brightness from the frame before, on
            32 × 24 pixels. `"flow"`: mean length of dense optical flow from the frame before, at a width of 160 pixels
            (DIS; needs opencv-python-headless). `"every"`: not at all; every frame counts the same, so each
            `1 / share`-th is taken.
        share: Share of the frames to take, above 0 to 1. A stream that changes at once and then stands still gives
            fewer.
        rate: Key frames a second, at most; None for no limit.

    Raises:
        ModuleNotFoundError: Rule `"flow"` without OpenCV.
        TypeError, ValueError: A bad argument.
    """

    def __init__(
        self,
        frames: Iterable[Frame],
        rule: KeyFrameRule = "difference",
        *,
        share: float = 0.1,
        rate: float | None = None,
    ) -> None:
        if rule not in get_args(KeyFrameRule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(KeyFrameRule))}, got {rule!r}")
        for name, value, most in (("share", share, 1.0), ("rate", rate, 1e6)):
            if value is None and name == "rate":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not 0 < value <= most:
                raise ValueError(f"{name}: expected above 0 to {most:g}, got {value}")
        if rule == "flow":
            _dense_flow()
        self.frames, self.rule, self.share, self.rate = frames, rule, share, rate

    def __iter__(self) -> Iterator[Frame]:
        pick = (
            self._evenly()
            if self.rule == "every"
            else self._largest(_difference if self.rule == "difference" else _dense_flow())
        )
        last: float | None = None
        for frame in self.frames:
            picked = pick(frame)
            soon = last is not None and self.rate is not None and frame.time - last < (1 - 1e-9) / self.rate
            if picked and not soon:
                last = frame.time
                yield frame

    def _evenly(self) -> Callable[[Frame], bool]:
        due = 1.0

        def pick(_: Frame) -> bool:
            nonlocal due
            # a share of 0.3 takes three of ten
            now, due = due >= 1 - 1e-9, due + self.share
            if now:
                due -= 1
            return now

        return pick

    def _largest(self, change: Callable[[np.ndarray, Any], tuple[float, Any]]) -> Callable[[Frame], bool]:
        recent: deque[float] = deque(maxlen=WINDOW)
        before: Any = None

        def pick(frame: Frame) -> bool:
            nonlocal before
            first = before is None
            score, before = change(frame.image, before)
            if first:
                return True
            recent.append(score)
            # of equal scores none is larger than the others
            return score > 0 and sum(other >= score for other in recent) <= max(1.0, self.share * len(recent))

        return pick


def _grey(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return brightness `[height, width]`, 0 to 255, as means of areas."""
    from PIL import Image

    whole = Image.fromarray(image).convert("L")
    return np.asarray(whole.resize((width, height), Image.Resampling.BOX))


def _difference(image: np.ndarray, before: np.ndarray | None) -> tuple[float, np.ndarray]:
    small = _grey(image, *_SMALL).astype(np.float32)
    return 0.0 if before is None else float(np.abs(small - before).mean()), small


def _dense_flow() -> Callable[[np.ndarray, Any], tuple[float, Any]]:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rule: expected OpenCV for flow: pip install opencv-python-headless", name=error.name
        ) from None
    dense = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def change(image: np.ndarray, before: np.ndarray | None) -> tuple[float, np.ndarray]:
        # DIS cannot work on less than some blocks of pixels
        height = max(16, round(_FLOW_WIDTH * image.shape[0] / image.shape[1]))
        small = _grey(image, _FLOW_WIDTH, height)
        if before is None:
            return 0.0, small
        flow = dense.calc(before, small, None)
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean()), small

    return change
