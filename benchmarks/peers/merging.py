"""MA-LMM's compression of a memory bank, batched and without a loop: the fastest form in eager PyTorch.

Written from its description (arXiv 2404.05726, section 3.2): the most similar pair of neighbours of each patch
position is averaged with the numbers of frames as weights; the others close up by an index.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(bank: Tensor, size: Tensor, level: str) -> tuple[Tensor, Tensor]:
    """Merge one pair of `bank [S, T, N, D]`, `size [S, T, N]`; "token" is MA-LMM's level, "frame" compares means."""
    S, T, N, D = bank.shape
    compared = bank if level == "token" else bank.mean(2, keepdim=True)
    similarity = F.cosine_similarity(compared[:, :-1], compared[:, 1:], dim=-1)
    place = similarity.max(1, keepdim=True).indices.expand(-1, -1, N)
    # the entry after the chosen one is added to it and then removed
    entries = torch.arange(T - 1, device=bank.device).reshape(1, -1, 1).expand(S, -1, N)
    source = torch.where(entries > place, entries + 1, entries)
    wide, row = place[..., None].expand(-1, -1, -1, D), source[..., None].expand(-1, -1, -1, D)
    first, second = size.gather(1, place), size.gather(1, place + 1)
    mean = (bank.gather(1, wide) * first[..., None] + bank.gather(1, wide + 1) * second[..., None]) / (first + second)[
        ..., None
    ]
    merged = bank.gather(1, row).scatter_(1, wide, mean.to(bank.dtype))
    return merged, size.gather(1, source).scatter_(1, place, first + second)
