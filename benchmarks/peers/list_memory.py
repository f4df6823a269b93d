"""Working and episodic memory as Python lists of frames, as in ports of VLM² (arXiv 2511.20644).

Every step reads the memory out with `torch.cat`; the most similar entry is found on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class WorkingMemory:
    """The last `capacity` frames."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.frames = capacity, []

    def push(self, frame: Tensor) -> Tensor:
        if len(self.frames) == self.capacity:
            self.frames.pop(0)
        self.frames.append(frame.clone())
        return torch.cat(self.frames)


class EpisodicMemory:
    """At most `capacity` frames `[N, D]`; a new frame replaces the most similar one."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.frames = capacity, []

    def push(self, frame: Tensor) -> int:
        if len(self.frames) < self.capacity:
            self.frames.append(frame.clone())
            return -1
        flat = frame.flatten()
        scores = [float(F.cosine_similarity(flat, entry.flatten(), dim=0)) for entry in self.frames]
        place = max(range(len(scores)), key=scores.__getitem__)
        self.frames[place] = frame.clone()
        return place


def replace_(slots: Tensor, frame: Tensor, level: str) -> Tensor:
    """Replace the most similar of full slots `[M, N, D]`, without a loop or host copy: the best eager form."""
    rows, one = (slots.flatten(1), frame.flatten()) if level == "flat" else (slots.mean(1), frame.mean(0))
    place = F.cosine_similarity(rows, one[None], dim=-1).argmax(0, keepdim=True)
    slots.index_copy_(0, place, frame[None])
    return place
