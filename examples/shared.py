"""Shared parts of the examples: arguments, a film, and a model (a checkpoint, or a tiny random one)."""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from vmemory.models.loading import load_model
from vmemory.models.pixels import patch_rows, scaled
from vmemory.sources import FrameSource

VIDEO, START, END = "<video>", "<start>", "<end>"
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %} {{ c.text }}"
    "{% else %}<start><video><end>{% endif %}{% endfor %}{% endfor %}"
)


def arguments(description: str, given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a checkpoint, by path or name; without it a tiny random model runs")
    parser.add_argument("--video", type=Path, help="a video file, two frames a second; without it a drawn film")
    return parser.parse_args(given)


def film(path: Path | None, frames: int = 48) -> Tensor:
    """Return uint8 `[n, 3, H, W]` at two frames per second: a file, or a square that crosses three coloured scenes."""
    if path is not None:
        return torch.from_numpy(np.stack([frame.image for frame in FrameSource(path, fps=2.0)])).permute(0, 3, 1, 2)
    drawn = torch.zeros(frames, 3, 32, 32, dtype=torch.uint8)
    for i, picture in enumerate(drawn):
        picture[3 * i // frames] = 90
        x = 2 * i % 28
        picture[:, 14:20, x : x + 4] = 250
    return drawn


def prompt(processor: Any, frames: Tensor, question: str) -> dict[str, Any]:
    """Return the model's inputs for a video and a question."""
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], videos=[frames], return_tensors="pt"))


def load(name: str | None, family: str = "qwen2_5_vl") -> tuple[Any, Any]:
    """Load a model and its processor."""
    if name is not None:
        return load_model(name)
    torch.manual_seed(0)
    text = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    ids = {"image_token_id": 190, "video_token_id": 191, "vision_start_token_id": 192, "vision_end_token_id": 193}
    seeing = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
    if family == "internvl":
        vision = {**seeing, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [32, 32]}
        text.pop("rope_parameters")
        # InternVL's videos are runs of picture tokens
        config = transformers.InternVLConfig(
            text_config={"model_type": "qwen2", **text}, vision_config=vision, image_token_id=191
        )
        model = transformers.InternVLForConditionalGeneration(config)
    else:
        vision = {
            **seeing, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "window_size": 16, "tokens_per_second": 2,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        )
    return model.eval(), TinyProcessor(family)


class TinyProcessor:
    """A processor for the tiny model, instead of `AutoProcessor`: bytes as tokens, frames as pixels."""

    def __init__(self, family: str) -> None:
        self.family = family
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:189]
        vocabulary = {"<pad>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
        vocabulary |= {"<image>": 190, VIDEO: 191, START: 192, END: 193}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", chat_template=TEMPLATE
        )
        self.tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO, START, END]})

    def apply_chat_template(self, chat: list[dict[str, Any]], **settings: Any) -> str:
        written: str = self.tokenizer.apply_chat_template(chat, **settings)
        return written

    def __call__(self, text: list[str], videos: list[Tensor], return_tensors: str = "pt") -> dict[str, Tensor]:
        pixels = scaled(videos[0], (32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        if self.family == "internvl":
            run = "".join(f"Frame{i + 1}: {START}{VIDEO * 16}{END}\n" for i in range(len(pixels)))
            inputs = {"pixel_values": pixels}
            written = text[0].replace(START + VIDEO + END, run)
        else:
            rows, grid = patch_rows(pixels, 4, 2, 2)
            inputs = {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([grid])}
            inputs["second_per_grid_ts"] = torch.ones(1)
            written = text[0].replace(VIDEO, VIDEO * (prod(grid) // 4))
        ids = self.tokenizer(written, return_tensors=return_tensors, add_special_tokens=False)["input_ids"]
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs if self.family == "internvl" else inputs | {"mm_token_type_ids": (ids == 191).int() * 2}
