"""Picture files of any depth, still or moving, as uint8 RGB."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = frozenset(
    (".apng", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)  # fmt: skip
# formats whose files move, or hold pages; a JPEG's further pictures are depths and previews of the first
_MOVING, _PAGES = frozenset(("GIF", "PNG", "WEBP")), frozenset(("TIFF",))
_SEVERAL = frozenset((".apng", ".gif", ".png", ".tif", ".tiff", ".webp"))
# seconds of a moving picture whose file says 0 or nothing, as browsers show it
_QUICK = 0.1
# a TIFF's tag by which a page says what it is, and the bit of those that are a preview of another
_SUBFILE, _PREVIEW = 254, 1


class Shown(NamedTuple):
    """A picture uint8 RGB `[H, W, 3]`, and for how many seconds its file shows it; None = it does not say."""

    image: np.ndarray
    seconds: float | None


def rgb(picture: Any) -> np.ndarray:
    """A Pillow picture as uint8 RGB `[H, W, 3]`.

    More than 8 bits are scaled: integers as if 65,535 were white, floating values as if 1 were. A picture with values
    beyond that or below 0 is stretched from its least to its greatest finite value. NaN is black.
    """
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return np.array(picture.convert("RGB"))
    # in double: 32-bit integers stay whole, and the range of the largest floats does not overflow
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
    """Every picture of a file, in order; a still is turned upright.

    Raises:
        Exception: What Pillow raises on a file that it cannot read, or that is too large to be decoded.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        moves = opened.format in _MOVING
        count = getattr(opened, "n_frames", 1) if moves or opened.format in _PAGES else 1
        if count == 1:
            yield Shown(rgb(ImageOps.exif_transpose(opened)), None)
            return
        # an animated PNG may bring a picture for those who cannot show the others
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
    # what Pillow raises on damaged files; whoever reads the file says what is wrong with it
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError):
        return False


def read_picture(path: Path) -> np.ndarray:
    """The first picture of a file, uint8 RGB `[H, W, 3]`; raises what `pictures_of` does."""
    return next(iter(pictures_of(path))).image
