"""From an encoder's feature size to a bank's."""

from __future__ import annotations

import torch
from torch import nn


class FeatureAdapter(nn.Sequential):
    """Linear and LayerNorm from an encoder's feature size to a bank's (VideoLLaMA3 memory bank port)."""

    def __init__(
        self, features: int, dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(
            nn.Linear(features, dim, device=device, dtype=dtype), nn.LayerNorm(dim, device=device, dtype=dtype)
        )
