"""Batches of conversations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from vmemory.data.online.prompt import IGNORED, join_inputs
from vmemory.data.online.reading import Skipped
from vmemory.models.adapter import Inputs


class Collator:
    """Puts items of an `OnlineVideoDataset` into one batch, padded behind; items that cannot be used stay out.

    Args:
        tokenizer: Of the model; its `pad_token_id` or else its `eos_token_id` fills rows up.

    Raises:
        ValueError: It has neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("tokenizer: expected a pad_token or an eos_token, got neither")
        self.fill = {"input_ids": int(pad), "labels": IGNORED, "attention_mask": 0, "mm_token_type_ids": 0}

    def __call__(self, items: Sequence[Inputs | Skipped]) -> Inputs:
        """Put items into a batch: rows `[B, L]`, and all their videos behind each other.

        Raises:
            ValueError: No item of the batch can be used, or they do not fit into one.
        """
        skipped = [item for item in items if isinstance(item, Skipped)]
        used = [item for item in items if not isinstance(item, Skipped)]
        for item in skipped:
            warnings.warn(f"left out: {item.name}: {item.reason}", stacklevel=2)
        if not used:
            first = f"{skipped[0].name}: {skipped[0].reason}" if skipped else "none"
            raise ValueError(
                f"batch: expected an item that can be used, got {first}; OnlineVideoDataset.verify() finds damaged "
                "videos before"
            )
        batch: Inputs = {}
        for name, value in self.fill.items():
            if all(name in item for item in used):
                rows = [item[name] for item in used]
                batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        videos = [{name: x for name, x in item.items() if name not in self.fill} for item in used]
        videos = [video for video in videos if video]
        return {**batch, **join_inputs(videos)} if videos else batch
