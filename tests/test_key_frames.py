"""Frames at which something changes."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice, pairwise

import numpy as np
import pytest

from vmemory.sources import Frame, FrameSource, KeyFrames

RULES = [
    "difference",
    "every",
    pytest.param("flow", marks=pytest.mark.skipif(not find_spec("cv2"), reason="no OpenCV")),
]


def stream(images: list[np.ndarray], fps: float = 4.0) -> list[Frame]:
    return [Frame(image, i / fps, i) for i, image in enumerate(images)]


def scene(number: int, shift: int = 0) -> np.ndarray:
    """A textured picture; the shift moves it to the right."""
    rough = np.random.RandomState(number).randint(0, 255, (15, 20, 3)).astype(np.uint8)
    return np.roll(rough.repeat(8, 0).repeat(8, 1), shift, axis=1)


def indices(frames: KeyFrames) -> list[int]:
    return [frame.index for frame in frames]


def test_takes_the_cuts_of_a_stream_with_noise():
    draw = np.random.RandomState(0)
    images = [(scene(i // 50) // 2 + draw.randint(0, 9, (120, 160, 3))).astype(np.uint8) for i in range(200)]
    found = indices(KeyFrames(stream(images), share=0.05))
    assert {0, 50, 100, 150} <= set(found)
    assert len(found) <= 20


@pytest.mark.skipif(not find_spec("cv2"), reason="OpenCV is not installed")
def test_flow_sees_movement_to_the_side_and_upwards():
    for axis in (0, 1):
        still, moving = [scene(1)] * 30, [np.roll(scene(1), i, axis=axis) for i in range(1, 4)]
        found = indices(KeyFrames(stream([*still, *moving, *[moving[-1]] * 30]), "flow", share=0.1))
        assert found[0] == 0
        assert set(found[1:]) <= {30, 31, 32}
        assert 30 in found


@pytest.mark.parametrize("rule", RULES)
def test_is_causal_and_keeps_nothing_between_streams(rule):
    images = [scene(i // 7, i % 5) for i in range(60)]
    both = KeyFrames(stream(images), rule, share=0.2)
    whole = indices(both)
    assert indices(both) == whole
    assert whole[0] == 0
    for stop in (1, 20, 45):
        assert indices(KeyFrames(stream(images[:stop]), rule, share=0.2)) == [i for i in whole if i < stop]
    # a frame comes out before the next is asked for
    assert next(iter(KeyFrames(islice(iter(stream(images)), 1), rule))).index == 0


def test_a_picture_that_stands_still_has_one_key_frame():
    assert indices(KeyFrames(stream([scene(3)] * 50))) == [0]


def test_every_takes_its_share_evenly():
    images = [scene(0)] * 40
    assert indices(KeyFrames(stream(images), "every", share=0.25)) == list(range(0, 40, 4))
    assert indices(KeyFrames(stream(images), "every", share=1)) == list(range(40))
    assert len(indices(KeyFrames(stream(images), "every", share=0.3))) == 12


@pytest.mark.parametrize("rule", RULES)
def test_the_rate_is_never_exceeded(rule):
    images = [scene(i) for i in range(80)]
    frames = list(KeyFrames(stream(images, fps=10.0), rule, share=1, rate=2))
    assert 1 < len(frames) <= 17
    assert min(b.time - a.time for a, b in pairwise(frames)) >= 0.5 - 1e-6


def test_reads_a_source():
    clip = np.stack([scene(i // 10) for i in range(40)])
    assert indices(KeyFrames(FrameSource(clip, source_fps=4.0), share=0.1)) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rule": "best"}, ValueError, "rule: expected one of difference, flow, every, got 'best'"),
        ({"share": 0}, ValueError, "share: expected above 0 to 1, got 0"),
        ({"share": 1.5}, ValueError, "share: expected above 0 to 1, got 1.5"),
        ({"share": float("nan")}, ValueError, "share: expected above 0 to 1, got nan"),
        ({"share": None}, TypeError, "share: expected a number, got NoneType"),
        ({"rate": 0.0}, ValueError, "rate: expected above 0"),
        ({"rate": "2"}, TypeError, "rate: expected a number, got str"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        KeyFrames([], **arguments)


@pytest.mark.skipif(bool(find_spec("cv2")), reason="OpenCV is installed")
def test_flow_without_opencv_says_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match="pip install opencv-python-headless"):
        KeyFrames([], "flow")
