"""The model: VideoLLaMA3's architecture in transformers, with 1.1 million parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmemory.models.pixels import patch_rows, scaled
from vmemory.train.worldlm.words import END, IMAGE, PAD, VIDEO, vocabulary

PATCH, MERGE, SIDE = 16, 2, 64
# tokens of a frame: a quarter of the picture each
CELLS = (SIDE // PATCH // MERGE) ** 2
_HALF = (0.5, 0.5, 0.5)


def world_model(seed: int = 0, hidden: int = 128, layers: int = 4, vision: int = 80) -> Any:
    """Make the model with new weights.

    Args:
        seed: Of the weights.
        hidden, layers: Of the language model.
        vision: Channels of the tower.
    """
    import transformers

    known = vocabulary()
    config = transformers.VideoLlama3Config(
        text_config={
            "model_type": "qwen2", "vocab_size": len(known), "hidden_size": hidden,
            "intermediate_size": 8 * hidden // 3,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 16384, "pad_token_id": known[PAD], "bos_token_id": None,
            "eos_token_id": known[END], "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": vision, "intermediate_size": 3 * vision, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": PATCH,
        },
        image_token_id=known[IMAGE], video_token_id=known[VIDEO], tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.VideoLlama3ForConditionalGeneration(config)
        # of length 1: short ones would soon be others than those that the projector learned
        table: Any = model.get_input_embeddings()
        torch.nn.init.normal_(table.weight, std=hidden**-0.5)
    model.generation_config.pad_token_id = known[PAD]
    model.generation_config.eos_token_id = known[END]
    return model


def frame_rows(pictures: Tensor) -> tuple[Tensor, list[int]]:
    """Turn pictures uint8 `[n, 64, 64, 3]` into rows of patches `[16 n, 768]`, four of a cell behind each other."""
    return patch_rows(scaled(pictures.permute(0, 3, 1, 2), (SIDE, SIDE), _HALF, _HALF), PATCH, MERGE, 1)
