"""Read picture files of any bit depth, still or animated, as uint8 RGB."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = frozenset(
    (".apng", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)  # fmt: skip
# formats with animations or pages; further pictures in a JPEG are depth maps and previews of the first
_MOVING, _PAGES = frozenset(("GIF", "PNG", "WEBP")), frozenset(("TIFF",))
_SEVERAL = frozenset((".apng", ".gif", ".png", ".tif", ".tiff", ".webp"))
# seconds per picture if an animation states none or 0, as in browsers
_QUICK = 0.1
# the TIFF tag of a page's type, and its bit for a preview of another page
_SUBFILE, _PREVIEW = 254, 1


class Shown(NamedTuple):
    """A picture uint8 RGB `[H, W, 3]`, and the seconds for which its file shows it; None = not stated."""

    image: np.ndarray
    seconds: float | None


def rgb(picture: Any) -> np.ndarray:
    """Convert a Pillow picture to uint8 RGB `[H, W, 3]`.

    Pictures of more than 8 bits are scaled: white is 65,535 for integers and 1 for floating values. A picture with
    other values is stretched from its least to its greatest finite value. NaN is black.
    """
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return np.array(picture.convert("RGB"))
    # in float64 32-bit integers are exact, and the range of the largest floats does not overflow
    values = np.asarray(picture).astype(np.float64)
    low, high = 0.0, 1.0 if picture.mode == "F" else 65535.0
    finite = values[np.isfinite(values)]
    if finite.size and (finite.min() < low or finite.max() > high):
        low, high = float(finite.min()), float(finite.max())
    if low == high:
        return np.zeros((*values.shape, 3), np.uint8)
    grey = np.nan_to_num(((values - low) * (255 / (high - low))).clip(0, 255)).round()
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def pictures_of(path: Path) -> Iterator[Shown]:
    """Yield every picture of a file, in order; a still picture is rotated upright.

    Raises:
        Exception: Any exception of Pillow for a file that it cannot read or that is too large to decode.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        moves = opened.format in _MOVING
        count = getattr(opened, "n_frames", 1) if moves or opened.format in _PAGES else 1
        if count == 1:
            yield Shown(rgb(ImageOps.exif_transpose(opened)), None)
            return
        # the first picture of an animated PNG may be a fallback that is not part of the animation
        for i in range(1 if getattr(opened, "default_image", False) else 0, count):
            opened.seek(i)
            if not moves and opened.tag_v2.get(_SUBFILE, 0) & _PREVIEW:  # type: ignore[attr-defined]  # a TIFF has them
                continue
            image = rgb(opened)
            yield Shown(image, float(opened.info.get("duration") or 0) / 1e3 or _QUICK if moves else None)


def holds_several(path: Path) -> bool:
    """Return whether a file holds more than one picture; False for a damaged file."""
    from PIL import Image

    if path.suffix.lower() not in _SEVERAL:
        return False
    try:
        with Image.open(path) as opened:
            return bool(getattr(opened, "is_animated", False))
    # Pillow's exceptions on damaged files; the reader of the file reports the damage
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError):
        return False


def read_picture(path: Path) -> np.ndarray:
    """Return the first picture of a file, uint8 RGB `[H, W, 3]`; raises as `pictures_of`."""
    return next(iter(pictures_of(path))).image
