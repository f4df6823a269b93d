"""What tests of models with a memory share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vmemory
from tests.tiny_vlms import tiny

FAMILIES = ["qwen2_5_vl", "video_llama_3"]
SMALL = {"memory_capacities": (3, 2, 1)}
FITS = {"memory_policy": "recent", "memory_capacities": (100,)}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def with_a_small_memory(family: str) -> tuple[Any, dict[str, Any], Tensor, Tensor]:
    """A model without a memory, inputs, and what it gives with a small one: logits and an answer."""
    model, inputs = tiny(family, T=12)
    with vmemory.attach(model, config=SMALL), torch.no_grad():
        logits, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    return model, inputs, logits, answer


@torch.no_grad()
def remembers(model: Any, inputs: dict[str, Any], logits: Tensor, answer: Tensor) -> bool:
    """Whether a model gives these logits and this answer to the bit."""
    same = torch.equal(model(**inputs).logits, logits)
    return same and torch.equal(model.generate(**inputs, **GREEDY), answer)
