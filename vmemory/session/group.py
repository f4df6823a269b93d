"""`SessionGroup`: several memories watch one stream, and each frame is encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from vmemory._attach import adapter_of, base_of
from vmemory.banks.config import ConfigLike
from vmemory.models.memories import Memory, MemoryFactory, is_factory
from vmemory.session.prompt import Processor
from vmemory.session.session import VideoSession
from vmemory.session.tower import Tower
from vmemory.sources.frames import FramesLike, TimeLike, as_frames

if TYPE_CHECKING:
    from collections.abc import Iterator


class SessionGroup:
    """Sessions with different memories over one stream and one model. The vision tower runs once for all of them.

    Args:
        model, processor: As in `VideoSession`.
        memories: By a name, the settings of each memory, or what `VideoSession` takes as `memory`.
        settings: Further arguments of every `VideoSession`.

    Attributes:
        sessions: The sessions by name; ask any of them.
        tower: The tower that they share.

    Raises:
        ValueError: There is no memory, or a setting does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor | None,
        memories: Mapping[str, str | Memory | MemoryFactory | ConfigLike | None],
        **settings: Any,
    ) -> None:
        if not memories:
            raise ValueError("memories: expected at least one, got none")
        self.tower = Tower(base_of(model), adapter_of(base_of(model)), processor, shared=True)
        self.sessions: dict[str, VideoSession] = {}
        for name, memory in memories.items():
            if isinstance(memory, str) or is_factory(memory) or hasattr(memory, "push"):
                session = VideoSession(model, processor, cast("str | Memory | MemoryFactory", memory), **settings)
            else:
                session = VideoSession(model, processor, config=cast("ConfigLike | None", memory), **settings)
            session.tower = self.tower
            self.sessions[name] = session

    def __iter__(self) -> Iterator[VideoSession]:
        return iter(self.sessions.values())

    def push(self, frames: FramesLike, time: TimeLike | None = None) -> None:
        """Push frames into every session, oldest first.

        Args:
            frames, time: As in `VideoSession.push`.

        Raises:
            TypeError, ValueError: As in `VideoSession.push`.
        """
        for pixels, seconds in as_frames(frames, time):
            known = [second for second in seconds if second is not None]
            for session in self:
                session.push(pixels, known if len(known) == len(seconds) else None)
