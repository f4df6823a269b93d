"""Big Buck Bunny and a trailer cut from it: ten minutes of real video with a known answer for every moment.

Both ship in the source distribution of moviepy, whose documentation cuts the trailer from the film with a
published edit list. The film is (c) copyright Blender Foundation, www.bigbuckbunny.org, licensed under
Creative Commons Attribution 3.0; it is fetched, never redistributed.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from vmemory.data._packages import Member, Package, fetch

ATTRIBUTION = "Big Buck Bunny, (c) copyright Blender Foundation | www.bigbuckbunny.org, CC BY 3.0"

_MEDIA = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes"

FILM = Package(
    "moviepy==2.2.1 --hash=sha256:c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1",
    "Big Buck Bunny and its trailer (58 MB from PyPI)",
    "film",
    MappingProxyType(
        {
            "bbb.mp4": Member(
                f"{_MEDIA}/moviepy_10_minutes.zip",
                "moviepy_10_minutes/resources/bbb.mp4",
                "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
            ),
            "trailer_bbb.mp4": Member(
                f"{_MEDIA}/trailer_bbb.mp4",
                None,
                "ce0d2ba68822a89ae65ee41b53be9de621771130c2aa1d0ff02d935df75b59ae",
            ),
        }
    ),
    source=True,
)

# (first second, end, offset to film time) of the trailer; a crossfade lies between the last two
_CUTS = (
    (0.0, 10.0, 1.0),
    (10.0, 14.0, 6.0),
    (14.0, 32.0, 23.0),
    (32.0, 36.0, 182.75),
    (36.0, 45.75, 188.75),
    (46.0, 48.7, 235.75),
)


def trailer_to_film(t: float) -> float | None:
    """Return the second of the film at second `t` of the trailer; None for titles and crossfades."""
    for first, end, offset in _CUTS:
        if first <= t < end:
            return t + offset
    return None


def fetch_film(cache_dir: str | Path | None = None) -> Path:
    """Return the path of Big Buck Bunny (`bbb.mp4`, 1280 x 720, 24 frames per second, 596.4 s, 50 MB).

    The first call downloads 58 MB through pip and unpacks film and trailer; later calls check the files.

    Args:
        cache_dir: where `film/` is made; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.

    Raises:
        FetchError: the download fails, or a file does not have the expected SHA-256.
    """
    return fetch(FILM, cache_dir) / "bbb.mp4"


def fetch_trailer(cache_dir: str | Path | None = None) -> Path:
    """Return the path of the trailer (`trailer_bbb.mp4`, 1280 x 720, 24 frames per second, 55.1 s)."""
    return fetch(FILM, cache_dir) / "trailer_bbb.mp4"
