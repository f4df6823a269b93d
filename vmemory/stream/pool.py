"""Many streams over one model, and a bound on the bytes of all sessions together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from vmemory.banks import parse_bytes
from vmemory.stream.session import VideoSession


class SessionPool:
    """Sessions by name; those not used for longest wait on disk while the others are over the budget.

    A session that comes back goes on where it was. The one asked for stays, whatever it weighs; the budget counts what
    the others hold beside it.

    Args:
        open_session: Makes an empty session, for a new name and to be given what waits on disk.
        budget: `"2GiB"` or bytes of all sessions that are held, memory and prompt cache.
        folder: Where sessions wait; made if missing. A pool over the same folder finds them again.

    Raises:
        ValueError: Not a size.
    """

    def __init__(self, open_session: Callable[[], VideoSession], budget: str | int, folder: str | Path) -> None:
        self.budget, self.folder = parse_bytes(budget), Path(folder)
        self._open = open_session
        self._held: OrderedDict[str, VideoSession] = OrderedDict()
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, name: str) -> VideoSession:
        """The session of a name, new if nobody has used it; others make room for it."""
        session = self._held.pop(name, None)
        if session is None:
            session = self._open()
            path = self._path(name)
            if path.exists():
                session.resume(path)
        self._held[name] = session
        self._make_room()
        return session

    def __contains__(self, name: str) -> bool:
        return name in self._held or self._path(name).exists()

    def __iter__(self) -> Iterator[str]:
        """Names of the sessions that are held, the longest unused first."""
        return iter(list(self._held))

    @property
    def nbytes(self) -> int:
        """Bytes of the sessions that are held."""
        return sum(session.nbytes for session in self._held.values())

    def drop(self, name: str) -> None:
        """Forget a session, on disk too."""
        self._held.pop(name, None)
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Write all sessions that remember anything to the folder."""
        for name in [name for name, session in self._held.items() if session.nbytes]:
            self._store(name)
        self._held.clear()

    def _make_room(self) -> None:
        # the last is the one asked for; those that hold nothing free nothing
        *others, _ = self._held.items()
        for name, session in others:
            if self.nbytes > self.budget and session.nbytes:
                self._store(name)

    def _store(self, name: str) -> None:
        # written before it leaves: a full disk loses nothing
        self._held[name].save(self._path(name))
        del self._held[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.vmem"
