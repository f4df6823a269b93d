"""TempMe's merging with all scores stored, as its paper (ICLR 2025, arXiv 2409.01156, section 3) describes it.

Written from the description, in its fastest eager form: clips are joined by a copy, class tokens cut off and put back;
between them one batched product, a sort of the row maxima, gathers, and a `scatter_reduce` for tokens and for sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmemory.compress import MergeStep


def join(x: Tensor, clips: int, cls: int) -> Tensor:
    """Join neighbouring `clips` of `x [B, N, D]` to one sequence, with the `cls` class tokens of each in front."""
    if clips == 1:
        return x
    x = x.unflatten(0, (-1, clips))
    return torch.cat([x[:, :, :cls].flatten(1, 2), x[:, :, cls:].flatten(1, 2)], 1)


def merge(metric: Tensor, x: Tensor, size: Tensor, r: int, cls: int) -> tuple[Tensor, Tensor]:
    """Merge r patch tokens of `x [B, N, D]` by `metric [B, N, E]`; return tokens and sizes `[B, N', 1]`."""
    # even positions of the whole sequence merge into odd ones; class tokens count as positions but do not merge
    evens, odds = slice(cls + cls % 2, None, 2), slice(cls + 1 - cls % 2, None, 2)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (unit[:, evens] @ unit[:, odds].mT).max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)[..., None]
    leave, stay = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    into = partner[..., None].gather(1, leave)

    def total(rows: Tensor) -> Tensor:
        wide = (-1, -1, rows.shape[-1])
        moved = rows[:, evens].gather(1, leave.expand(wide))
        joined = rows[:, odds].scatter_reduce(1, into.expand(wide), moved, "sum")
        return torch.cat([rows[:, :cls], rows[:, evens].gather(1, stay.expand(wide)), joined], 1)

    merged = total(size)
    return total(x * size) / merged, merged


def merge_steps(x: Tensor, steps: Sequence[MergeStep], width: int) -> tuple[Tensor, Tensor]:
    """Run all merges of a tower on tokens `[clips, N, D]`; merges within clips compare the first channels."""
    size = torch.ones_like(x[..., :1])
    for step in steps:
        if step.join > 1:
            x, size = (join(rows, step.join, step.cls // step.join) for rows in (x, size))
            x, size = merge(x, x, size, step.cross, step.cls)
        if step.intra:
            x, size = merge(x[..., :width], x, size, step.intra, step.cls)
    return x, size
