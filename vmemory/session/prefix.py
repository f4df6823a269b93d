"""Keep the key-value cache of a prompt up to the end of its video from one question to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vmemory.models.adapter import Adapter, Inputs
from vmemory.models.hooks import generation_setting
from vmemory.models.turn import cache_argument, cache_in


class PromptPrefix:
    """The key-value cache of a prompt up to the end of its video, computed again when the video has changed.

    Args:
        model: The model that answers.
        adapter: The adapter of its family.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter
        self._kept: tuple[tuple[object, ...], Any] | None = None

    def clear(self) -> None:
        """Drop the cache."""
        self._kept = None

    @property
    def nbytes(self) -> int:
        if self._kept is None:
            return 0
        tensors = [x for layer in self._kept[1].layers for x in vars(layer).values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors)

    def usable(self, generation: dict[str, Any]) -> bool:
        """Return whether `generate` with these settings uses a plain cache that the caller has not given."""
        plain = generation_setting(self.model, generation, "cache_implementation") is None
        cached = generation_setting(self.model, generation, "use_cache") is not False
        return plain and cached and cache_in(generation)[1] is None

    def continued(self, inputs: Inputs, seen: tuple[object, ...], rows: int, still: Callable[[], bool]) -> Inputs:
        """Return the inputs with a copy of the cache, which is computed first if the video has changed.

        Args:
            inputs: The result of `VideoSession.prompt`.
            seen: A key that is equal for prompts with equal videos.
            rows: Number of rows of the cache, for beams or several answers.
            still: Returns whether `seen` is still mask; the cache is not kept if another thread has changed the video.
        """
        cache = self.cache(inputs, seen, rows, still)
        if cache is None:
            return inputs
        rest = {name: x for name, x in inputs.items() if name != "mm_encoder_outputs"}
        places = rest.get("position_ids")
        if places is not None:
            # the model keeps its rope deltas between calls, so they must be those of this prompt
            length = inputs["input_ids"].shape[1]
            self.adapter.set_rope_deltas(self.model, places[1:, :, -1:].amax(0) + 1 - length)
        return {**rest, cache_argument(self.model): cache}

    def cache(self, inputs: Inputs, seen: tuple[object, ...], rows: int, still: Callable[[], bool]) -> Any:
        """Return a copy of the cache, as in `continued`; None if the model's cache cannot have several rows."""
        ids = inputs["input_ids"]
        end = int((ids[0] == self.adapter.placeholder_id(self.model)).nonzero()[-1]) + 1
        key, kept = (*seen, ids[0, :end].tolist()), self._kept
        if kept is None or kept[0] != key:
            cut = {name: x[..., :end] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            if "position_ids" in cut:
                cut["position_ids"] = cut["position_ids"][1:]
            kept = self._kept = (key, cache_in(self.model(**cut, use_cache=True))[1])
            if not still():
                self._kept = None
        if rows > 1 and not all(hasattr(layer, "batch_repeat_interleave") for layer in kept[1].layers):
            # a cache with linear attention layers cannot be copied
            return None
        cache = copy.deepcopy(kept[1])
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache
