"""Observe the queries of a language model's attention layers during a forward pass, without changing the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def attention_layers(model: Any) -> list[Any]:
    """Return the decoder's self-attention modules in order, without those of a vision tower.

    Raises:
        ValueError: There are none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]
    if not found:
        raise ValueError(
            f"model: expected a language model of transformers, found no attention in {type(model).__name__}"
        )
    return sorted(found, key=lambda m: m.layer_idx)


@contextmanager
def observed_queries(model: Any, seen: dict[int, Tensor], last: int) -> Iterator[None]:
    """Record the last queries of each forward pass in `seen`, within a context.

    transformers looks up the attention function by name on every call. Within the context these names refer to a
    function that records the query and calls the original. Other models are not recorded.

    Args:
        model: A language model, or a model around one.
        seen: Maps a layer's index to `[B, H, min(last, N), E]`, rotated and scaled so that a score is q · k / √E.
        last: Number of queries to keep of a pass.

    Raises:
        ValueError: `model` has no attention layers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

    layers = attention_layers(model)
    watched = {id(layer) for layer in layers}
    names = {str(layer.config._attn_implementation) for layer in layers}
    before = {name: table.get(name) for name in names}

    def through(original: Callable[..., Any] | None) -> Callable[..., Any]:
        def attend(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if id(module) in watched:
                channels = query.shape[-1] ** 0.5
                scale = kwargs.get("scaling")
                kept = query[:, :, -last:]
                seen[module.layer_idx] = kept if scale is None else kept * (scale * channels)
            # eager attention is defined in each model's own file and has no entry in the table
            run = original or sys.modules[type(module).__module__].eager_attention_forward
            return run(module, query, *args, **kwargs)

        return attend

    for name in names:
        table[name] = through(before[name])
    try:
        yield
    finally:
        for name, original in before.items():
            del table[name]
            if table.get(name) is not original:
                table[name] = original
