"""Add a model family in one class: InternVL, whose videos are runs of pictures.

python examples/custom_family.py [--model OpenGVLab/InternVL3-1B-hf --video film.mp4]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from shared import arguments, film, load, prompt
from torch import Tensor

import vmemory
from vmemory.integrations.llava import Llava
from vmemory.models.adapter import as_pooling


@vmemory.register_adapter("internvl")
class InternVL(Llava):
    """Adapter with pictures as in LLaVA, `Frame1:` before each, features as one tensor, and sizes as pairs."""

    def pack(self, output: Any, tokens: Sequence[Tensor]) -> Any:
        return as_pooling(torch.cat(list(tokens))[None])

    def frame_size(self, model: Any, size: tuple[int, int], tokens: int) -> tuple[int, int]:
        height, width = model.config.vision_config.image_size
        return height, width


@torch.no_grad()
def main(given: list[str] | None = None) -> tuple[bool, int, int]:
    """Return whether a large memory leaves the logits unchanged, and the visual tokens with and without a small one."""
    args = arguments(__doc__.splitlines()[0], given)
    model, processor = load(args.model, "internvl")
    inputs = prompt(processor, film(args.video, 16), "What happened?")
    plain = model(**inputs).logits
    # check this first for a new family
    with vmemory.attach(model, "recent", {"memory_capacities": 1000}):
        same = torch.equal(model(**inputs).logits, plain)
    with vmemory.attach(model, config={"memory_capacities": [2, 2, 2]}) as handle:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        (kept,) = handle.last_prompt
    print(f"a memory that holds everything changes nothing: {same}")
    print(f"{kept.tokens_before} visual tokens became {kept.tokens_after}")
    return same, kept.tokens_before, kept.tokens_after


if __name__ == "__main__":
    main()
