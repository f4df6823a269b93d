"""LLaVA-OneVision: square frames, a newline after each video, plain positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vmemory.models.adapter import one_tensor
from vmemory.models.families import SquareFrameAdapter
from vmemory.models.registry import register_adapter


@register_adapter("llava_onevision")
class LlavaOnevision(SquareFrameAdapter):
    """Adapter that always keeps the newline."""

    newline = 1

    def pack(self, output: Any, tokens: Sequence[Tensor]) -> Any:
        return one_tensor(tokens)
