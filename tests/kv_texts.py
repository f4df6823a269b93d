"""Small text models, prompts for them and memories that bound their caches."""

from __future__ import annotations

import torch
import transformers

from tests.tiny_vlms import tiny
from vmemory.kv import KVMemory

TEXT = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPANS = ("uniform", "similar", "hierarchical")
FAMILIES = ("llama", "qwen2", "video_llama_3", "qwen2_5_vl")
BUDGET, LENGTH, CHUNK = 40, 120, 12


def text_model(family: str = "llama", **more):
    torch.manual_seed(0)
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[family]
    config = getattr(transformers, f"{kind}Config")(**TEXT, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def prompt(family: str, B: int = 1):
    """A model, embedded input `[B, N, C]` and positions; those of Qwen2.5-VL are three-dimensional and not in steps."""
    if family in ("llama", "qwen2"):
        model = text_model(family)
        ids = torch.randint(3, 190, (B, LENGTH), generator=torch.Generator().manual_seed(1))
        return model, model.get_input_embeddings()(ids).detach(), torch.arange(LENGTH).expand(B, -1)
    model, inputs = tiny(family, T=8 if family == "video_llama_3" else 6)
    ids = inputs["input_ids"].expand(B, -1)
    if family == "qwen2_5_vl":
        positions = model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            second_per_grid_ts=inputs["second_per_grid_ts"],
        )[0].expand(3, B, -1)
    else:
        positions = torch.arange(ids.shape[1]).expand(B, -1)
    embeds = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(2))
    return model, embeds, positions


def make(policy: str, budget: int | str = BUDGET, **options) -> KVMemory:
    return KVMemory(budget, policy, **({"span": 6} if policy in SPANS else {}) | options)
