"""VideoChat-Online's memory bank as its authors wrote it: lists of entries, every decision on the host.

Entries are channels first, `[1, C, h, w]`; each eviction pools every entry of the group again, concatenates the means
and asks for the index of the closest pair of list neighbours.

Source: `HierarchicalMemoryBank` of MCG-NJU/VideoChat-Online, modeling_videochat_online.py (arXiv 2501.00584).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Entry = dict[str, Any]


@dataclass
class Group:
    capacity: int
    reduced_size: int
    entries: list[Entry] = field(default_factory=list)


class HierarchicalMemoryBank:
    """Groups of (capacity, tokens per frame), finest first."""

    def __init__(self, capacities: tuple[int, ...], reduced_sizes: tuple[int, ...]) -> None:
        pairs = zip(capacities, reduced_sizes, strict=True)
        self.groups = [Group(capacity, size) for capacity, size in pairs]

    @staticmethod
    def reduce(tokens: Tensor, size: int) -> Tensor:
        side = int(size**0.5)
        if tokens.shape[-2:] == (side, side):
            return tokens
        return F.interpolate(tokens, size=(side, side), mode="bilinear", align_corners=False)

    @staticmethod
    def most_similar(group: Group) -> int:
        """Return the list index of the earlier one of the closest neighbours."""
        means = torch.cat([entry["tokens"].mean(dim=(2, 3)) for entry in group.entries], dim=0)
        return int(F.cosine_similarity(means[1:], means[:-1], dim=-1).argmax().item())

    def update_group(self, group: Group, tokens: Tensor, index: int, below: Group | None) -> None:
        if len(group.entries) >= group.capacity > 0:
            at = self.most_similar(group)
            if below is not None:
                # the victim of the next group is dropped, because no further group is passed
                entry = group.entries[at]
                self.update_group(below, self.reduce(entry["tokens"], below.reduced_size), entry["index"], None)
            group.entries.pop(at)
        tokens = self.reduce(tokens, group.reduced_size)
        group.entries.append({"tokens": tokens, "index": index, "cls_token": tokens.mean(dim=(2, 3))})

    def update_memory(self, tokens: Tensor, index: int) -> None:
        """Take one frame `[1, C, h, w]` into the group of its size.

        Raises:
            NotImplementedError: No group has frames of h * w tokens.
        """
        cells = tokens.shape[2] * tokens.shape[3]
        for at, group in enumerate(self.groups):
            if group.reduced_size == cells:
                below = self.groups[at + 1] if at + 1 < len(self.groups) else None
                self.update_group(group, tokens, index, below)
                return
        raise NotImplementedError(f"tokens: no group has frames of {cells} tokens")

    def output_by_time_order(self) -> tuple[list[Tensor], list[int]]:
        """Return entries `[1, h * w, C]` and their frame numbers, by time."""
        entries = sorted((e for group in self.groups for e in group.entries), key=lambda entry: entry["index"])
        tokens = [entry["tokens"].flatten(2).transpose(1, 2) for entry in entries]
        return tokens, [entry["index"] for entry in entries]
