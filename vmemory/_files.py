"""The user's cache directory, checksums, and atomic file replacement."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_dir(given: str | Path | None = None) -> Path:
    """Return `given`, else `$VMEMORY_CACHE`, else `~/.cache/vmemory`, and create the directory."""
    path = Path(given or os.environ.get("VMEMORY_CACHE") or Path.home() / ".cache" / "vmemory").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Provide a temporary path that replaces `path`, synced to disk, when the block ends without an error.

    Links are followed: what they point to is replaced. What writers that were killed left beside it is removed.

    Raises:
        ValueError: What is there is no file: a directory, a device; or no file can have this name.
    """
    if "\0" in str(path):
        raise ValueError(f"path: expected a name without NUL, got {str(path)!r}")
    # a user with the right to write there could replace /dev/null by a file
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"path: expected a file or nothing there yet, got {path}")
    remove_stale(path)
    handle, temporary = _temporary(path)
    try:
        yield temporary
        # a temporary file is private; the result gets the permissions of any new file
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder lie on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems do not support it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


_ENDING = ".vmemory-part"


def _prefix(path: Path) -> str:
    # a hash of fixed length: a prefix of the name could exceed the limit of a long name
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:20]}."


def _temporary(path: Path) -> tuple[int, Path]:
    """Create a file beside `path`, locked while the handle is open; return handle and path."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=_ENDING)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # another process may have removed the file as stale before it was locked
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def remove_stale(path: Path | None = None, folder: Path | None = None) -> None:
    """Remove temporary files of `path`, or of a whole folder, whose writers have ended.

    A writer holds a lock on its own for as long as it lives. Folders that cannot be written to keep what they have.
    """
    where = path.parent if path is not None else folder
    prefix = "." if path is None else _prefix(path)
    if where is None or not os.access(where, os.R_OK | os.W_OK):
        return
    names = [name for name in os.listdir(where) if name.startswith(prefix) and name.endswith(_ENDING)]
    for name in names:
        with suppress(FileNotFoundError, PermissionError, BlockingIOError), (where / name).open("rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (where / name).unlink()
