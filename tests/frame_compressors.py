"""Small frame compressors of every kind, and videos for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vmemory.compress import AdaptiveFrameResampler, FrameResampler, FrameSelector
from vmemory.testing import random_tensor

SMALL: dict[str, Any] = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}
KINDS = ["selector", "exact selector", "resampler", "hard resampler", "adaptive", "hard adaptive"]


def make(kind: str, seed: int = 0, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    hard = {"hard": kind.startswith("hard")}
    if kind == "selector":
        return FrameSelector(**({"compression_ratio": 0.5, "hidden_dim": 16} | arguments)).eval()
    if kind == "exact selector":
        return FrameSelector(**({"hidden_dim": 16, "output_frames": 4} | arguments)).eval()
    if kind.endswith("resampler"):
        return FrameResampler(**({"input_frames": 12, "output_frames": 4} | SMALL | hard | arguments)).eval()
    module = AdaptiveFrameResampler(
        **({"max_input_frames": 12, "min_output_frames": 2, "max_output_frames": 5} | SMALL | hard | arguments)
    ).eval()
    # spread the scores, or every clip would ask for half of its frames
    with torch.no_grad():
        module.scorer.weight.mul_(20)
    return module


def video(B: int = 2, T: int = 9, size: int = 20, seed: int = 0, **kind: Any) -> Tensor:
    return random_tensor(B, T, 3, size, size, seed=seed, **kind)


def holes(B: int, T: int, seed: int = 1) -> Tensor:
    """Which frames exist: all, most, then fewer and fewer, in the end none."""
    kept = torch.rand(B, T, generator=torch.Generator().manual_seed(seed))
    return kept < torch.linspace(1, 0, B)[:, None]
