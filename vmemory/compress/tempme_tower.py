"""Read the vision tower of Hugging Face's and OpenAI's CLIP models through one interface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HUGGING_FACE = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
_OPENAI = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")


def vision_tower(model: nn.Module) -> tuple[Any, Any]:
    """Return the vision tower of a model and the projection of its embeddings, or None for the projection.

    Raises:
        TypeError: `model` is no CLIP model with a vision transformer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a CLIP model or its vision tower, got {type(model).__name__}")
    visual: Any = getattr(model, "visual", model)
    if all(hasattr(visual, name) for name in _OPENAI):
        openai = OpenAITower(visual)
        return openai, openai.project
    tower: Any = model
    while not hasattr(tower, "pre_layrnorm") and hasattr(tower, "vision_model"):
        tower = tower.vision_model
    missing = [name for name in _HUGGING_FACE if not hasattr(tower, name)]
    if missing:
        raise TypeError(
            f"model: expected a CLIP model or its vision tower, got {type(model).__name__} without {missing}"
        )
    return tower, getattr(model, "visual_projection", None)


class OpenAITower(nn.Module):
    """OpenAI's `VisionTransformer`, which CLIP4Clip and others include, under Hugging Face's names.

    Nothing is copied: every attribute is a view of `visual`, made on access. Weights that are trained, moved or
    replaced later are therefore the ones that run. Blocks may take other arguments than a tensor (CLIP4Clip's take a
    tuple), because only their submodules are called.

    Args:
        visual: The transformer, with a square image of equal patches.

    Raises:
        TypeError: Its patches are embedded in three dimensions (CLIP4Clip's `linear_patch="3d"`), which mixes frames
            before the first layer.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        if hasattr(visual, "conv2"):
            raise TypeError("model: expected patches of single frames (linear_patch='2d'), got '3d'")
        self.visual: Any = visual
        self.training = visual.training

    @property
    def embeddings(self) -> _Embeddings:
        return _Embeddings(self.visual)

    @property
    def encoder(self) -> SimpleNamespace:
        return SimpleNamespace(layers=[_Layer(block) for block in self.visual.transformer.resblocks])

    @property
    def pre_layrnorm(self) -> Any:
        return self.visual.ln_pre

    @property
    def post_layernorm(self) -> Any:
        return self.visual.ln_post

    def project(self, x: Tensor) -> Tensor:
        return x @ self.visual.proj


class _Embeddings:
    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.patch_embedding = visual.conv1
        self.class_embedding = visual.class_embedding
        self.num_positions = visual.positional_embedding.shape[0]
        self.image_size = round((self.num_positions - 1) ** 0.5) * visual.conv1.kernel_size[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).mT
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([first, x], 1) + self.visual.positional_embedding.to(x.dtype)


class _Layer:
    def __init__(self, block: Any) -> None:
        self.self_attn = _Attention(block.attn)
        self.layer_norm1, self.mlp, self.layer_norm2 = block.ln_1, block.mlp, block.ln_2
        self.training = block.training

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class _Attention:
    """The parts of `nn.MultiheadAttention`; a wrapper or replacement of its `in_proj_weight` stays in effect."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.num_heads, self.dropout, self.training = attention.num_heads, attention.dropout, attention.training
        self.scale = attention.head_dim**-0.5
        self.out_proj = attention.out_proj

    def q_proj(self, x: Tensor) -> Tensor:
        return self._project(x, 0)

    def k_proj(self, x: Tensor) -> Tensor:
        return self._project(x, 1)

    def v_proj(self, x: Tensor) -> Tensor:
        return self._project(x, 2)

    def _project(self, x: Tensor, part: int) -> Tensor:
        bias = self.attention.in_proj_bias
        return F.linear(x, self.attention.in_proj_weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part])

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scale)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
