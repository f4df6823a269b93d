"""The user's cache directory, checksums, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir(given: str | Path | None = None) -> Path:
    """`given`, else `$VMEMORY_CACHE`, else `~/.cache/vmemory`; made if it does not exist."""
    path = Path(given or os.environ.get("VMEMORY_CACHE") or Path.home() / ".cache" / "vmemory").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Links are followed: what they point to is replaced.

    Raises:
        ValueError: What is there is no file: a directory, a device.
    """
    # whoever may write there could replace /dev/null by a file
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"path: expected a file or nothing there yet, got {path}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # a temporary file is private; the result gets the permissions of any new file
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
