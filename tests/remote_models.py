"""Small classes with the methods and the data flow of remote code that cannot be imported here, on a tiny Qwen2."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.tiny_vlms import SIDE, VOCABULARY, drifting, stamp, words

PLACE, SENTINEL = 190, -200
_PATCH = 3 * 4


def qwen2(**more: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


class RemoteVideoLlama3(Qwen2ForCausalLM):
    """As `Videollama3Qwen2ForCausalLM`: placeholders in the prompt, several prompts in a row, tokens pruned inside."""

    class Attention(nn.Module):
        """Over the patches of all pictures and frames in one sequence, each frame's for itself.

        In the original's eager attention the mask of bool is added to the scores: 1 more for a patch of the same frame,
        and patches of other frames are seen as well.
        """

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.project = nn.Linear(16, 48)

        def forward(self, x: Tensor, frame: Tensor) -> Tensor:
            query, key, value = self.project(x).chunk(3, -1)
            same = frame[:, None] == frame
            if self.config._attn_implementation == "eager":
                return (query @ key.T / 4 + same).softmax(-1) @ value
            return F.scaled_dot_product_attention(query[None], key[None], value[None], same[None])[0]

    class Tower(nn.Module):
        """Attends within frames, and makes one token of `merge × merge` neighbouring patches."""

        def __init__(self, attention: str) -> None:
            super().__init__()
            self.config = SimpleNamespace(_attn_implementation=attention)
            self.patch = nn.Linear(_PATCH, 16)
            self.self_attn = RemoteVideoLlama3.Attention(self.config)
            self.calls: list[int] = []

        def forward(self, pixel_values: Tensor, grid_sizes: Tensor, merge_sizes: Tensor) -> Tensor:
            self.calls.append(len(pixel_values))
            sizes = torch.repeat_interleave(grid_sizes[:, 1] * grid_sizes[:, 2], grid_sizes[:, 0])
            x = self.patch(pixel_values)
            x = x + self.self_attn(x, torch.repeat_interleave(sizes))
            made = []
            for rows, (t, h, w), m in zip(
                x.split(grid_sizes.prod(-1).tolist()), grid_sizes.tolist(), merge_sizes.tolist(), strict=True
            ):
                made.append(rows.view(t * (h // m) * (w // m), m * m, -1).mean(1))
            return torch.cat(made)

    def __init__(self, config: Qwen2Config, attention: str = "sdpa") -> None:
        super().__init__(config)
        self.model.vision_encoder = self.Tower(attention)
        self.model.mm_projector = nn.Linear(16, config.hidden_size)

    def get_model(self) -> Any:
        return self.model

    def get_vision_encoder(self) -> Any:
        return self.get_model().vision_encoder

    def encode_images(self, pixel_values: Tensor, grid_sizes: Tensor, merge_sizes: Tensor) -> Tensor:
        tower = self.get_vision_encoder()
        features = tower(pixel_values=pixel_values, grid_sizes=grid_sizes, merge_sizes=merge_sizes)
        return self.get_model().mm_projector(features)

    def _get_valid_visual_tokens(self, features: Tensor, counts: Tensor, modals: list[str]) -> Tensor:
        real = [torch.full((int(n),), modal != "text") for n, modal in zip(counts, modals, strict=True)]
        return features[torch.cat(real)]

    def _get_compression_mask(
        self, pixel_values: Tensor, counts: Tensor, grid_sizes: Tensor, merge_sizes: Tensor, modals: list[str]
    ) -> Tensor:
        masks = []
        rows = pixel_values.split(grid_sizes.prod(-1).tolist())
        for x, n, (t, h, w), m, modal in zip(
            rows, counts.tolist(), grid_sizes.tolist(), merge_sizes.tolist(), modals, strict=True
        ):
            mask = torch.ones(t, n // t if modal != "text" else 0, dtype=torch.bool)
            if modal == "video" and t > 1:
                x = x.view(t, (h // m) * (w // m), -1)
                mask[1:] = (x[1:] - x[:-1]).abs().mean(-1) * 255 > 56
                mask[mask.sum(1) < 1, :1] = True
            masks.append(mask.flatten())
        return torch.cat(masks)

    def _maybe_truncate_visual_tokens(
        self, mm_features: Tensor, mask: Tensor, counts: Tensor, modals: list[str], input_ids: Tensor,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if position_ids is None or len(mm_features) == (input_ids == PLACE).sum():
            return mm_features, mask
        keep = [torch.ones(0 if modal == "text" else int(n), dtype=torch.bool) for n, modal in zip(counts, modals)]  # noqa: B905
        ends = [end for end in (position_ids == 0).nonzero().flatten().tolist() if end > 0] + [len(input_ids)]
        held = [(input_ids[start:stop] == PLACE).sum() for start, stop in pairwise([0, *ends])]
        # as the original: a picture or a video for each prompt, and those behind stay whole
        for n, mask in zip(held, keep, strict=False):
            mask[n:] = False
        there = torch.cat(keep)
        return mm_features[there], mask[there]

    def _compress_visual_tokens(
        self, compression_mask: Tensor, mm_features: Tensor, input_ids: Tensor, attention_mask: Any = None,
        position_ids: Any = None, labels: Any = None,
    ) -> Any:  # fmt: skip
        keep = input_ids != PLACE
        keep[input_ids == PLACE] = compression_mask
        mask, targets = (None if x is None else x[keep] for x in (attention_mask, labels))
        if position_ids is not None:
            starts = [0, *(position_ids[keep] == 0).nonzero().flatten().tolist(), int(keep.sum())]
            position_ids = torch.cat([torch.arange(stop - start) for start, stop in pairwise(starts)])
        return mm_features[compression_mask], input_ids[keep], mask, position_ids, targets

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        labels: Any = None, pixel_values: Any = None, grid_sizes: Any = None, merge_sizes: Any = None,
        modals: Any = None,
    ) -> Any:  # fmt: skip
        if pixel_values is None or input_ids.shape[1] == 1:
            return input_ids, attention_mask, position_ids, past_key_values, None, labels
        B = len(input_ids)
        ids = input_ids.flatten()
        mask, position_ids, labels = (
            None if x is None else x.flatten() for x in (attention_mask, position_ids, labels)
        )
        counts = grid_sizes.prod(1) // merge_sizes**2
        features = self.encode_images(pixel_values, grid_sizes, merge_sizes)
        features = self._get_valid_visual_tokens(features, counts, modals)
        pruned = self._get_compression_mask(pixel_values, counts, grid_sizes, merge_sizes, modals)
        features, pruned = self._maybe_truncate_visual_tokens(features, pruned, counts, modals, ids, position_ids)
        if self.config.use_token_compression:
            assert B == 1
            features, ids, mask, position_ids, labels = self._compress_visual_tokens(
                pruned, features, ids, mask, position_ids, labels
            )
        embeds = self.model.embed_tokens(ids).clone()
        embeds[ids == PLACE] = embeds[ids == PLACE] * 0.0 + features
        mask, position_ids, labels = (None if x is None else x.view(B, -1) for x in (mask, position_ids, labels))
        return None, mask, position_ids, past_key_values, embeds.view(B, -1, embeds.shape[-1]), labels

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, labels: Any = None, pixel_values: Any = None, grid_sizes: Any = None,
        merge_sizes: Any = None, modals: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, attention_mask, position_ids, past_key_values, labels, pixel_values, grid_sizes,
                    merge_sizes, modals,
                )
            )  # fmt: skip
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, **more,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self, pixel_values: Any = None, grid_sizes: Any = None, merge_sizes: Any = None, modals: Any = None, **more: Any
    ) -> Any:
        ids, mask, position_ids, past = (
            more.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids", "past_key_values")
        )
        if "inputs_embeds" in more:
            raise NotImplementedError("`inputs_embeds` is not supported")
        embeds = self.model.embed_tokens(ids)
        if pixel_values is not None:
            _, mask, position_ids, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=past,
                pixel_values=pixel_values, grid_sizes=grid_sizes, merge_sizes=merge_sizes, modals=modals,
            )  # fmt: skip
        return super().generate(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, **more)


def video_llama(
    T: int = 8, prompts: int = 1, picture: bool = False, own: bool = False, attention: str = "sdpa"
) -> tuple[Any, dict[str, Any]]:
    """A model and one row of packed prompts, each with a video of T, T + 3, … frames; first a picture where asked."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    config = qwen2()
    config.model_type = "videollama3_qwen2"
    config.use_token_compression, config.image_token_index = own, PLACE
    model = RemoteVideoLlama3(config, attention).eval()
    pixels, grids, modals, rows, positions = [], [], [], [], []
    for b in range(prompts):
        t = T + 3 * b
        parts = [words(4 + b, draw)]
        if picture:
            pixels.append(torch.randn(16, _PATCH, generator=draw))
            grids.append([1, 4, 4])
            modals.append("image")
            parts += [torch.full((4,), PLACE), words(2, draw)]
        pixels.append(drifting(t, (2 * SIDE) ** 2, _PATCH, draw))
        grids.append([t, 2 * SIDE, 2 * SIDE])
        modals.append("video")
        for f in range(t):
            parts += [torch.tensor([180] * int(f > 0), dtype=torch.long), stamp(f), torch.full((SIDE**2,), PLACE)]
        row = torch.cat([*parts, words(5, draw)])
        rows.append(row)
        positions.append(torch.arange(len(row)))
    ids = torch.cat(rows)[None]
    return model, {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.cat(positions)[None],
        "pixel_values": torch.cat(pixels), "grid_sizes": torch.tensor(grids),
        "merge_sizes": torch.full((len(grids),), 2), "modals": modals,
    }  # fmt: skip


class LlavaQwen(Qwen2ForCausalLM):
    """As `LlavaQwenForCausalLM`: one sentinel a video, of which the model makes tokens and newlines inside."""

    class Tower(nn.Module):
        num_patches_per_side = 2 * SIDE

        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 2, 2)
            self.calls: list[int] = []

        def forward(self, images: Tensor) -> Tensor:
            self.calls.append(len(images))
            return self.patch(images).flatten(2).mT

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model.vision_tower = self.Tower()
        self.model.mm_projector = nn.Linear(16, config.hidden_size)
        self.model.image_newline = nn.Parameter(torch.randn(config.hidden_size))

    def get_model(self) -> Any:
        return self.model

    def get_vision_tower(self) -> Any:
        return self.model.vision_tower

    def encode_images(self, images: Tensor) -> Tensor:
        return self.model.mm_projector(self.get_vision_tower()(images))

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        side = self.get_vision_tower().num_patches_per_side
        x = image_feature.view(len(image_feature), side, side, -1).permute(0, 3, 1, 2)
        pool = {"average": F.avg_pool2d, "max": F.max_pool2d}[self.config.mm_spatial_pool_mode]
        return pool(x, stride).flatten(2).mT

    def add_token_per_grid(self, image_feature: Tensor) -> Tensor:
        n, D = image_feature.shape[1:]
        rows = image_feature.view(-1, round(n**0.5), D)
        return torch.cat([rows, self.model.image_newline.expand(len(rows), 1, D)], 1).flatten(0, 1)

    def add_token_per_frame(self, image_feature: Tensor) -> Tensor:
        newline = self.model.image_newline.expand(len(image_feature), 1, image_feature.shape[-1])
        return torch.cat([image_feature, newline], 1)

    def _with_newlines(self, feature: Tensor) -> Tensor:
        where = self.config.mm_newline_position
        if where == "grid":
            return self.add_token_per_grid(feature)
        if where == "frame":
            return self.add_token_per_frame(feature).flatten(0, 1)
        flat = feature.flatten(0, 1)
        return torch.cat([flat, self.model.image_newline[None]]) if where == "one_token" else flat

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Any, position_ids: Any, attention_mask: Any, past_key_values: Any, labels: Any, images: Any,
        modalities: Any = ("image",), image_sizes: Any = None,
    ) -> Any:  # fmt: skip
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        modalities = [modalities] if isinstance(modalities, str) else modalities
        encoded = self.encode_images(torch.cat(list(images))).split([len(x) for x in images])
        pairs = zip(encoded, modalities, strict=True)
        pooled = [self.get_2dPool(x) if kind == "video" else x for x, kind in pairs]
        features = [
            self._with_newlines(x) if kind == "video" else x.flatten(0, 1)
            for x, kind in zip(pooled, modalities, strict=True)
        ]
        embeds, targets, at = [], [], 0
        for b, row in enumerate(input_ids):
            there = torch.ones_like(row, dtype=torch.bool) if attention_mask is None else attention_mask[b].bool()
            row, wanted = row[there], (torch.full_like(row, -100) if labels is None else labels[b])[there]
            parts, goals, start = [], [], 0
            for place in [*(row == SENTINEL).nonzero().flatten().tolist(), len(row)]:
                parts.append(self.model.embed_tokens(row[start:place]))
                goals.append(wanted[start:place])
                if place < len(row):
                    parts.append(features[at])
                    goals.append(wanted.new_full((len(features[at]),), -100))
                    at += 1
                start = place + 1
            embeds.append(torch.cat(parts))
            targets.append(torch.cat(goals))
        length = max(len(x) for x in embeds)
        left = self.config.tokenizer_padding_side == "left"
        pads = [(length - len(x), 0) if left else (0, length - len(x)) for x in embeds]
        whole = torch.stack([F.pad(x, (0, 0, *pad)) for x, pad in zip(embeds, pads, strict=True)])
        goals = torch.stack([F.pad(x, pad, value=-100) for x, pad in zip(targets, pads, strict=True)])
        mask = torch.stack([F.pad(torch.ones(len(x)), pad) for x, pad in zip(embeds, pads, strict=True)]).long()
        return None, position_ids, mask, past_key_values, whole, None if labels is None else goals

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, labels: Any = None, images: Any = None, image_sizes: Any = None,
        modalities: Any = ("image",), **more: Any,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities, image_sizes
                )
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, **more,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self, inputs: Any = None, images: Any = None, image_sizes: Any = None, modalities: Any = ("image",), **more: Any
    ) -> Any:
        _, position_ids, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, more.pop("position_ids", None), more.pop("attention_mask", None), None, None, images, modalities,
            image_sizes=image_sizes,
        )  # fmt: skip
        return super().generate(position_ids=position_ids, attention_mask=mask, inputs_embeds=embeds, **more)


def llava_qwen(T: int = 8, B: int = 1, newline: str = "one_token") -> tuple[Any, dict[str, Any]]:
    """A model, and B rows with a video of T, T + 3, … frames each."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    config = qwen2()
    # what the released class calls itself
    config.model_type = "llava_llama"
    config.mm_newline_position, config.mm_spatial_pool_mode, config.tokenizer_padding_side = newline, "average", "left"
    model = LlavaQwen(config).eval()
    rows = [torch.cat([words(4, draw), torch.tensor([SENTINEL]), words(5, draw)]) for _ in range(B)]
    images = []
    for b in range(B):
        first = torch.randn(1, 3, 4 * SIDE, 4 * SIDE, generator=draw)
        images.append(first + 0.2 * torch.randn(T + 3 * b, 3, 4 * SIDE, 4 * SIDE, generator=draw).cumsum(0))
    ids = torch.stack(rows)
    return model, {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "images": images, "modalities": ["video"] * B,
    }  # fmt: skip
