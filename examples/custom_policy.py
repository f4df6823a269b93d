"""A policy of your own: keep the frames that are least like the mean of those held.

python examples/custom_policy.py [--model Qwen/Qwen2.5-VL-3B-Instruct --video film.mp4]
"""

from __future__ import annotations

from shared import arguments, film, load, prompt
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vmemory
from vmemory.banks import SingleTierBank, register_policy


@register_policy
class OutlierBank(SingleTierBank):
    """A memory of the frames that differ most from the mean of all that it holds."""

    policy = "outliers"
    # a new frame goes to the end of the list, in the order of time
    rule = "recent"

    def choose(self, state, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return the slot `[S]` that a full memory gives up: the one most like the mean of all."""
        means = state.descriptor[:, :, 0]
        return cosine_similarity(means, means.mean(1, keepdim=True), dim=2).argmax(1)


def main(given: list[str] | None = None) -> list[int]:
    """Return the numbers of the kept frames."""
    args = arguments(__doc__.splitlines()[0], given)
    model, processor = load(args.model)
    inputs = prompt(processor, film(args.video), "What happened?")
    with vmemory.attach(model, "outliers", {"memory_capacities": 3}) as handle:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        (kept,) = handle.last_prompt
    frames = (kept.source // (kept.grid[1] * kept.grid[2])).unique().tolist()
    print(f"of {kept.grid[0]} frames these were kept: {frames}")
    return frames


if __name__ == "__main__":
    main()
