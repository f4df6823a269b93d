"""Merge tokens by a plan into weighted means, and spread them back."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_weights(size: Tensor, place: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the weight of each row in its token, `[B, M]`, and the sizes of the tokens, `[B, tokens]`.

    A single row has weight 1; rows whose sizes sum to 0 have equal weights.
    """
    total = size.new_zeros(len(size), tokens).scatter_add(1, place, size)
    count = size.new_zeros(len(size), tokens).scatter_add(1, place, torch.ones_like(size))
    total_of, count_of = total.gather(1, place), count.gather(1, place)
    share = torch.where(total_of > 0, size / torch.where(total_of > 0, total_of, 1), 1 / count_of)
    return torch.where(count_of == 1, 1, share), total


def token_merge(x: Tensor, size: Tensor | None, place: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return size-weighted means `[B, tokens, D]` of the rows of `x [B, M, D]` in each token, and their total sizes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = wide.new_ones(x.shape[:2]) if size is None else size
    share, total = merge_weights(size, place, tokens)
    means = wide.new_zeros(len(x), tokens, x.shape[2])
    means = means.scatter_add(1, place[..., None].expand(wide.shape), wide * share[..., None])
    return means.to(x.dtype), total


def token_unmerge(x: Tensor, place: Tensor) -> Tensor:
    """Spread `x [B, tokens, D]` to `[B, M, D]`: each row gets the token that contains it."""
    return x.gather(1, place[..., None].expand(*place.shape, x.shape[2]))
