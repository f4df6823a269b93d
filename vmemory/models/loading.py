"""Load a model and its processor from a folder or a hub."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def load_model(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a video model in evaluation mode and its processor.

    The video processors of transformers need torchvision. A session prepares frames itself, so without torchvision the
    tokenizer, its chat template and the pixel statistics are enough.

    Args:
        name: A folder or a model's id on a hub.
        device: `"cpu"`, `"cuda"`, …
        dtype: `"auto"` (as stored), `"bfloat16"`, `"float16"` or `"float32"`.

    Raises:
        ValueError: Not a model with text and pictures.
        OSError: The model does not exist.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    model = model.to(device).eval()
    if find_spec("torchvision") is not None:
        return model, AutoProcessor.from_pretrained(name)
    return model, text_processor(name)


def text_processor(name: str) -> Any:
    """Load tokenizer, chat template and pixel statistics of a model, without torchvision."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    def facts(file: str) -> dict[str, Any]:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        return {} if path is None else dict(json.loads(Path(path).read_text()))

    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = facts("chat_template.json").get("chat_template")
    pixels = facts("video_preprocessor_config.json") or facts("preprocessor_config.json")
    return SimpleNamespace(
        tokenizer=tokenizer,
        apply_chat_template=tokenizer.apply_chat_template,
        video_processor=SimpleNamespace(image_mean=pixels.get("image_mean"), image_std=pixels.get("image_std")),
    )


def device_for(name: str | None) -> str:
    """Return the named device, or without a name a GPU if there is one."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
