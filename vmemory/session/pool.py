"""Hold many sessions over one model, within a bound on their total bytes."""

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

# letters of a file name; a hash replaces the rest of longer names
_MOST_LETTERS = 160


class SessionPool:
    """A mapping from names to sessions; the least recently used ones move to disk when the budget is exceeded.

    A session that returns from disk continues where it was. The requested session always stays in memory; the others
    fit into the rest of the budget. Request a session from the pool for every use: one that moved to disk raises
    RuntimeError and accepts no frames. Any thread may request sessions; calls on one session take turns.

    After a kill, each session has the state of its last move to disk or of its last erasure: `erase` and `reset` also
    change the file of a session that was on disk before. `close` writes all sessions.

    Args:
        open_session: A function that makes an empty session, for a new name or to load one from disk.
        budget: `"2GiB"` or bytes of all sessions in memory, including prompt caches.
        folder: Folder of the sessions on disk; created if missing, and locked until `close`. A later pool over the same
            folder finds them again.

    Raises:
        ValueError: `budget` is not a size.
        RuntimeError: Another pool uses this folder.
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
        """Return the session of a name, a new one for a new name; other sessions may move to disk.

        Raises:
            TypeError: The name is not a string.
            BankFileError: The session's file cannot be used.
            OSError: Another session cannot be written to disk; nothing is lost.
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
        """Iterate over the names of the sessions in memory, the least recently used first."""
        return iter(list(self._held))

    @property
    @locked
    def nbytes(self) -> int:
        """Bytes of the sessions in memory."""
        return sum(session.nbytes for session in self._held.values())

    @locked
    def drop(self, name: str) -> None:
        """Delete a session, also on disk."""
        path = self._path(name)
        session = self._held.pop(name, None)
        if session is not None:
            session.leave("was dropped from its pool", keep=False)
        path.unlink(missing_ok=True)

    @locked
    def close(self) -> None:
        """Write all sessions that are not empty to the folder, and unlock it.

        Raises:
            OSError: A session cannot be written; sessions not yet written stay in memory.
        """
        for name in [name for name, session in self._held.items() if session.nbytes]:
            self._store(name)
        self._held.clear()
        self._release()

    def _release(self) -> None:
        if self._claim is not None:
            # a forked process with the open file would keep the folder locked
            fcntl.flock(self._claim, fcntl.LOCK_UN)
            os.close(self._claim)
            self._claim = None

    def _make_room(self) -> None:
        # the last one is requested; moving empty sessions frees nothing
        *others, _ = self._held.items()
        for name, session in others:
            if self.nbytes > self.budget and session.nbytes:
                self._store(name)

    def _store(self, name: str) -> None:
        # written before it is removed, so that a full disk loses nothing
        self._held[name].leave("waits on disk; ask its pool for it again", keep=True)
        del self._held[name]

    def _path(self, name: str) -> Path:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}")
        letters = quote(name, safe="", errors="surrogatepass")
        if len(letters) > _MOST_LETTERS:
            # "+" cannot occur in a quoted name
            digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
            letters = f"{letters[:_MOST_LETTERS]}+{digest}"
        return self.folder / f"{letters}.vmem"
