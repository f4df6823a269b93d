"""Tiny random CLIP models, and videos for them: 17 tokens a frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vmemory.testing import random_tensor

# merges what `vision` makes of six frames
SMALL: dict[str, Any] = {"frames": 6, "merge_layers": "2-3", "merge_frames": "3-2", "r": 2, "proportions": "30-10"}


def vision(layers: int = 5, **config: Any) -> Any:
    """A Hugging Face vision tower with projection."""
    import transformers

    arguments = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 24,
        "initializer_factor": 4.0,
    }
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**(arguments | config))
    return transformers.CLIPVisionModelWithProjection(config).eval()


def videos(B: int = 2, T: int = 6, size: int = 16, **kind: Any) -> Tensor:
    return random_tensor(B, T, 3, size, size, **kind)


class _Norm(nn.LayerNorm):
    """OpenAI's: computes in float32, so that a tower in float16 can keep its norms in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class _Block(nn.Module):
    """OpenAI's residual attention block; like CLIP4Clip's it takes a tuple, so that nothing can call it on a tensor."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = _Norm(width), _Norm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, pair: tuple[Tensor, int]) -> tuple[Tensor, int]:
        x, frames = pair
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x)), frames


class OpenAIVision(nn.Module):
    """OpenAI's `VisionTransformer` as CLIP4Clip has it, from its published attribute names: `[B · T, 3, H, W]` to the
    hidden states `[B · T, N, D]`, sequence first inside, projected by whoever calls it."""

    def __init__(self, width: int = 32, layers: int = 5, heads: int = 4, patch: int = 4, side: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width) / 2)
        self.ln_pre, self.ln_post = _Norm(width), _Norm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.proj = nn.Parameter(torch.randn(width, 24) / width**0.5)

    def forward(self, x: Tensor, video_frame: int = -1) -> Tensor:
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x, _ = self.transformer.resblocks((self.ln_pre(x).transpose(0, 1), video_frame))
        return x.transpose(0, 1)


class OpenAICLIP(nn.Module):
    """The parts of OpenAI's `CLIP` that retrieval calls, as CLIP4Clip has them; texts are token sums."""

    def __init__(self, **vision: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = OpenAIVision(**vision)
        self.tokens = nn.Embedding(40, 24)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, image: Tensor, video_frame: int = -1) -> Tensor:
        return (self.visual.ln_post(self.visual(image, video_frame)) @ self.visual.proj)[:, 0]

    def encode_text(self, text: Tensor) -> Tensor:
        return self.tokens(text).mean(1)
