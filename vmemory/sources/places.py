"""Names of sources: files and folders, addresses, cameras."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def place_of(given: str | Path | int) -> str | Path:
    """Return a file or folder as a path, anything else as an address with its scheme; a number is a camera.

    `Path` removes one slash of an address; this function restores it.
    """
    if isinstance(given, int):
        return Path(f"/dev/video{given}")
    text = str(given)
    found = _SCHEME.match(text)
    if found is None or (isinstance(given, Path) and given.exists()):
        return Path(given)
    address = f"{found[1]}://{text[found.end() :].removeprefix('/')}"
    return Path(url2pathname(urlsplit(address).path)) if found[1].lower() == "file" else address


def shown(place: str | Path) -> str:
    """Return a file's path, or an address without user name, password and tokens."""
    if not isinstance(place, str):
        return str(place)
    scheme, _, rest = place.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def name_of(place: str | Path) -> str:
    """Return the last part of a path or of an address."""
    return place.name if isinstance(place, Path) else shown(place).rstrip("/").rpartition("/")[2]


def kind_of(path: Path) -> str:
    """Return the kind of a path in words: a file, a directory, a pipe, a socket, a device, or nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "no such file or directory"
    for is_kind, words in (
        (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):  # fmt: skip
        if is_kind(mode):
            return words
    return "a device"
