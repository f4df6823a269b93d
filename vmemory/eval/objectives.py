"""Scores that a memory is tuned for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from vmemory._attach import adapter_of, base_of
from vmemory.banks import MemoryConfig
from vmemory.eval.cells import Cell
from vmemory.eval.evaluate import watch
from vmemory.eval.features import Features
from vmemory.eval.scoring import is_right
from vmemory.eval.setups import Setup
from vmemory.eval.streams import AskedStream
from vmemory.eval.trailer import Queries, evaluate
from vmemory.session.prompt import Processor
from vmemory.session.session import VideoSession

Report = Callable[[int, float], None]


class Objective(Protocol):
    """A score of memories, with the form of the frames that they hold.

    Attributes:
        grid: Tokens (H, W) of a frame.
        dim: Channels of a token.
        dtype: Of the tokens held.
    """

    grid: tuple[int, int]
    dim: int
    dtype: torch.dtype

    def score(self, config: MemoryConfig, report: Report) -> float:
        """Return the score of a memory, from 0 to 1; `report` gets the number of a step and the score so far."""
        ...


class WorldObjective:
    """The accuracy of a model that answers through a memory: the mean of that of *now* and of *past*.

    Args:
        model, processor: As in `evaluate`.
        streams: Streams of the validation split.
        frame_tokens, max_new_tokens: As in `evaluate`.

    Raises:
        ValueError: There are no streams.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        streams: Sequence[AskedStream],
        *,
        frame_tokens: int = 256,
        max_new_tokens: int = 16,
    ) -> None:
        if not streams:
            raise ValueError("streams: expected at least one, got none")
        self.model, self.processor, self.streams = model, processor, list(streams)
        self.frame_tokens, self.max_new_tokens = frame_tokens, max_new_tokens
        together = adapter_of(base_of(model)).temporal_patch_size(base_of(model))
        session = VideoSession(model, processor, "recent", {"memory_capacities": 1}, frame_tokens=frame_tokens)
        frames, seconds = next(self.streams[0].frames())
        session.push(frames[:together], seconds[:together])
        memory = session.memory
        if memory is None:
            raise ValueError(f"streams: expected at least {together} frames, got {len(seconds)}")
        self.grid, self.dim, self.dtype = memory.grid, memory.dim, session.held.tokens.dtype

    def score(self, config: MemoryConfig, report: Report) -> float:
        """Return the mean of the accuracies of now and past, over all streams."""
        cell = Cell("trial", config)
        right: dict[str, list[bool]] = {"now": [], "past": []}
        for step, stream in enumerate(self.streams):
            written = watch(self.model, self.processor, stream, [cell], self.frame_tokens, self.max_new_tokens)[
                "trial"
            ].written
            for question, text in zip(stream.questions, written, strict=True):
                right[question.when or "past"].append(is_right(question, text))
            report(step, _mean(right))
        return _mean(right)


class LocalisationObjective:
    """The share of pictures whose moment in a film is found in a memory of it; see `vmemory localize`.

    Args:
        film: Tokens of the film.
        queries: Pictures with known times.
    """

    def __init__(self, film: Features, queries: Queries) -> None:
        self.film, self.queries = film, queries
        _, height, width, self.dim = film.tokens.shape
        self.grid, self.dtype = (height, width), torch.float16

    def score(self, config: MemoryConfig, report: Report) -> float:
        """Return the share of pictures that are found."""
        bank = config.build(self.dim, self.grid, dtype=self.dtype)
        found = evaluate(bank, Setup(config.policy), self.film, self.queries)
        share = found.hits / found.asked
        report(0, share)
        return share


def _mean(right: dict[str, list[bool]]) -> float:
    return float(np.mean([np.mean(values) for values in right.values() if values]))
