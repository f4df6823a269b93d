"""Check transformers caches and inputs for a bounded key-value memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vmemory.ops._checks import shape_of


def new_cache(model: Any) -> Any:
    """Return an empty `DynamicCache` for `model`."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def plain_layers(cache: Any) -> list[Any]:
    """Return the cache's layers, which must be plain attention with equal rows.

    Raises:
        ValueError: A layer is not plain attention, the layers differ, or nothing was written.
    """
    from transformers.cache_utils import DynamicLayer

    layers = list(getattr(cache, "layers", ()))
    for i, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"cache: expected layers of plain attention (DynamicLayer), layer {i} is a {type(layer).__name__}, "
                "whose state has no rows that could leave one by one"
            )
    if not layers or not layers[0].is_initialized or layers[0].keys.dim() != 4:
        raise ValueError("cache: expected a DynamicCache that a model has written to, got an empty one")
    shapes = {tuple(layer.keys.shape[:3]) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"cache: expected the same batch, heads and rows in every layer, got {sorted(shapes)}")
    return layers


def one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[str, Tensor]:
    """Return name and tensor of the argument that is given.

    Raises:
        ValueError: Both or none are given, or the shape is wrong.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: expected either input_ids or inputs_embeds, got both or none")
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [B, N], got shape {shape_of(input_ids)}")
        return "input_ids", input_ids
    assert inputs_embeds is not None
    if inputs_embeds.dim() != 3:
        raise ValueError(f"inputs_embeds: expected [B, N, C], got shape {shape_of(inputs_embeds)}")
    return "inputs_embeds", inputs_embeds
