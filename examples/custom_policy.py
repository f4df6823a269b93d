"""Write a memory of your own: an object with `compress(clip, time, valid=…)` that returns the kept tokens.

python examples/custom_policy.py [--model Qwen/Qwen2.5-VL-3B-Instruct --video film.mp4]
"""

from __future__ import annotations

import torch
from shared import arguments, film, load, prompt
from torch import Tensor

import vmemory
from vmemory.banks import MemoryTokens


class SceneStarts:
    """Keep the first frame and the frames that differ most from their predecessor."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def compress(self, clip: Tensor, time: Tensor | None = None, *, valid: Tensor | None = None) -> MemoryTokens:
        """Compress `clip [T, H, W, D]`; `time [T]` seconds or None, `valid [T, H, W]` bool, cells that exist."""
        T, H, W, D = clip.shape
        alike = vmemory.ops.adjacent_similarity(clip.detach().reshape(1, T, H * W, D))[0]
        # [T]; the first frame has no predecessor and always stays
        alike = torch.cat([alike.new_full((1,), -1.0), alike])
        chosen = alike.argsort(stable=True)[: self.frames].sort().values
        source = torch.arange(T * H * W, device=clip.device).view(T, H * W)[chosen].flatten()
        if valid is not None:
            source = source[valid.flatten()[source]]
        return MemoryTokens.of(clip, source, time)


def main(given: list[str] | None = None) -> list[int]:
    """Return the numbers of the kept frames."""
    args = arguments(__doc__.splitlines()[0], given)
    model, processor = load(args.model)
    inputs = prompt(processor, film(args.video), "What happened?")
    with vmemory.attach(model, SceneStarts(3)) as handle:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        (kept,) = handle.last_prompt
    frames = (kept.source // (kept.grid[1] * kept.grid[2])).unique().tolist()
    print(f"of {kept.grid[0]} frames these were kept: {frames}")
    return frames


if __name__ == "__main__":
    main()
