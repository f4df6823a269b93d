"""Many streams over one model, and a bound on the bytes of all sessions together."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from vmemory._files import remove_stale
from vmemory.banks import parse_bytes
from vmemory.banks.lock import MemoryLock, locked
from vmemory.session.session import VideoSession

# of a name in a folder; longer ones are told apart by a hash
_MOST_LETTERS = 160


class SessionPool:
    """Sessions by name; those not used for longest wait on disk while the others are over the budget.

    A session that comes back goes on where it was. The one asked for stays, whatever it weighs; the budget counts what
    the others hold beside it. Ask the pool for a session whenever it is used: one that has left for the disk says so
    (RuntimeError) and takes no frames. Several threads may ask; each session lets one in at a time.

    A pool that is killed goes back to what each session was when it last left for the disk, or when something in it was
    last erased: `erase` and `reset` of a session that waited before reach its file too. `close` writes them all.

    Args:
        open_session: Makes an empty session, for a new name and to be given what waits on disk.
        budget: `"2GiB"` or bytes of all sessions that are held, memory and prompt cache.
        folder: Where sessions wait; made if missing, and locked until `close`. A pool over the same folder finds them
            again.

    Raises:
        ValueError: Not a size.
        RuntimeError: Another pool has this folder.
    """

    def __init__(self, open_session: Callable[[], VideoSession], budget: str | int, folder: str | Path) -> None:
        self.budget, self.folder = parse_bytes(budget), Path(folder)
        self._open = open_session
        self._held: OrderedDict[str, VideoSession] = OrderedDict()
        self._lock = MemoryLock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim: int | None = os.open(self.folder / ".pool", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._claim)
            self._claim = None
            raise RuntimeError(f"folder: expected one that no other pool has, got {self.folder}") from None
        remove_stale(folder=self.folder)

    def __del__(self) -> None:
        if getattr(self, "_claim", None) is not None:
            self._release()

    @locked
    def __getitem__(self, name: str) -> VideoSession:
        """The session of a name, new if nobody has used it; others make room for it.

        Raises:
            TypeError: A name that is no string.
            BankFileError: What waits on disk cannot be used.
            OSError: The disk does not take those that make room; nothing is lost.
        """
        path = self._path(name)
        if self._claim is None:
            raise RuntimeError("pool: expected one in use, got one that was closed")
        session = self._held.pop(name, None)
        if session is None:
            session = self._open()
            if path.exists():
                session.resume(path)
            session.kept_at(path)
        self._held[name] = session
        self._make_room()
        return session

    @locked
    def __contains__(self, name: str) -> bool:
        path = self._path(name)
        return name in self._held or path.exists()

    @locked
    def __iter__(self) -> Iterator[str]:
        """Names of the sessions that are held, the longest unused first."""
        return iter(list(self._held))

    @property
    @locked
    def nbytes(self) -> int:
        """Bytes of the sessions that are held."""
        return sum(session.nbytes for session in self._held.values())

    @locked
    def drop(self, name: str) -> None:
        """Forget a session, on disk too."""
        path = self._path(name)
        session = self._held.pop(name, None)
        if session is not None:
            session.leave("was dropped from its pool", keep=False)
        path.unlink(missing_ok=True)

    @locked
    def close(self) -> None:
        """Write all sessions that remember anything to the folder, and let go of it.

        Raises:
            OSError: The disk does not take one; what has not been written is still held.
        """
        for name in [name for name, session in self._held.items() if session.nbytes]:
            self._store(name)
        self._held.clear()
        self._release()

    def _release(self) -> None:
        if self._claim is not None:
            # a forked process that still has the file open would keep the folder locked
            fcntl.flock(self._claim, fcntl.LOCK_UN)
            os.close(self._claim)
            self._claim = None

    def _make_room(self) -> None:
        # the last is the one asked for; those that hold nothing free nothing
        *others, _ = self._held.items()
        for name, session in others:
            if self.nbytes > self.budget and session.nbytes:
                self._store(name)

    def _store(self, name: str) -> None:
        # written before it leaves: a full disk loses nothing
        self._held[name].leave("waits on disk; ask its pool for it again", keep=True)
        del self._held[name]

    def _path(self, name: str) -> Path:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}")
        letters = quote(name, safe="", errors="surrogatepass")
        if len(letters) > _MOST_LETTERS:
            # quoted names have no "+" of their own
            digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
            letters = f"{letters[:_MOST_LETTERS]}+{digest}"
        return self.folder / f"{letters}.vmem"
