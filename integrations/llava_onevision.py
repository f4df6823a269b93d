"""LLaVA-OneVision: square frames, a newline behind each video, plain positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vmemory.models.adapter import as_pooling
from vmemory.models.families import SquareFrameAdapter
from vmemory.models.registry import register_adapter


@register_adapter("llava_onevision")
class LlavaOnevision(SquareFrameAdapter):
    """The newline is always kept."""

    newline = 1

    def pack(self, output: Any, tokens: Sequence[Tensor]) -> Any:
        # the model flattens videos and tokens into one row; an entry a token is what beams divide between rows
        return as_pooling(torch.cat(list(tokens))[:, None])
