"""Merge tokens within and across the frames of a video, inside a CLIP vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmemory.compress.tempme_schedule import MergeStep, tempme_schedule
from vmemory.compress.tempme_tower import vision_tower
from vmemory.ops._checks import check_device, check_tensor, shape_of
from vmemory.ops.bipartite_match import bipartite_match, merge_source
from vmemory.ops.token_merge import proportional_attention_bias, token_merge


class MergedClips(NamedTuple):
    """The output of one layer for B videos of C clips each; the T frames had N tokens each before merging.

    Attributes:
        tokens: `[B · C, M, D]`. Each clip begins with the class tokens of its frames, in time order.
        size: `[B · C, M, 1]` float32 (float64 for a float64 tower), the number of original tokens in each token;
            padding counts 0. None before the first merge.
        source: `[B · C, T / C · N]` int64, the token of the clip that contains each original token. None before the
            first merge.
    """

    tokens: Tensor
    size: Tensor | None
    source: Tensor | None


class MergedVideo(NamedTuple):
    """The output of the tower for B videos; the T frames had N tokens each before merging.

    Attributes:
        frames: `[B, T, E]` embeddings of the frames, in time order, normalised and projected as the tower does with
            images; padding is 0.
        tokens: `[B, M, D]` the last layer's output. Clips that were not joined follow one another.
        size: `[B, M, 1]` float32 (float64 for a float64 tower), the number of original tokens in each token; padding
            counts 0.
        source: `[B, T · N]` int64, at t · N + n the index of the token that contains token n of frame t.
    """

    frames: Tensor
    tokens: Tensor
    size: Tensor
    source: Tensor


def _attend(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a layer's attention output with `size` in its scores, and its keys `[B, N, heads, D / heads]`."""
    query, key, value = (
        project(x).unflatten(-1, (attention.num_heads, -1))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if size is None else proportional_attention_bias(size, query.dtype),
        dropout_p=attention.dropout if attention.training else 0.0,
        scale=attention.scale,
    )
    return attention.out_proj(mixed.transpose(1, 2).flatten(2)), key


class TempMe(nn.Module):
    """A CLIP vision tower for videos that merges similar tokens within a frame, then across neighbouring frames.

    The first layers merge `r` tokens of each frame. Later merge layers join neighbouring clips into one sequence and
    merge its similar tokens, until the video is one clip. Attention sees the whole joined sequence. Class tokens never
    merge, so each frame keeps its embedding and its position in time. With the defaults a ViT-B/32 ends with 97 tokens
    instead of 600.

    The tower becomes a submodule and is not changed: no hook, no attribute, no weight. Full fine-tuning, adapters in
    its projections and gradient checkpointing work as before. A layer that has nothing to merge and no sizes to respect
    runs unchanged: with `r=0` and no merge layers the output is bit-identical to the tower's. Other layers call their
    own submodules around `scaled_dot_product_attention`, for any attention implementation that the model names.

    Args:
        model: A Hugging Face `CLIPModel`, `CLIPVisionModelWithProjection` or `CLIPVisionModel` of any size, or OpenAI's
            `CLIP` or `VisionTransformer`, as CLIP4Clip has it; with a projection in it frames come out projected.
        frames: Number of frames T of a video.
        merge_layers: Layers that join clips, counted from 0, ascending; `"8-9-10"` or ints. May be empty.
        merge_frames: How many neighbouring clips each of them joins; their product divides `frames`.
        r: Tokens that merge in each layer before the first merge layer.
        proportions: Per cent of the tokens that merge across and within clips from the first merge layer on.
        positions: Add a learned embedding of the clip, initialised to 0, to its tokens where clips are joined.
        proportional: Weight a merged token in attention by its number of original tokens.

    Attributes:
        schedule: A `MergeStep` for every layer.
        positions: The clip embeddings, `[clips, D]` for each merge layer, by the layer's number.

    Raises:
        TypeError: An argument is of the wrong kind, or `model` no CLIP vision tower.
        ValueError: A number breaks a rule above, or a layer cannot merge `r` tokens.

    Source: TempMe (ICLR 2025, arXiv 2409.01156) section 3. The released code merges padded frames and attends to them;
    `mask` excludes them here.
    """

    def __init__(
        self,
        model: nn.Module,
        frames: int = 12,
        *,
        merge_layers: str | Sequence[int] = "8-9-10",
        merge_frames: str | Sequence[int] = "2-2-3",
        r: int = 2,
        proportions: str | Sequence[int] = "30-10",
        positions: bool = True,
        proportional: bool = True,
    ) -> None:
        super().__init__()
        tower, projection = vision_tower(model)
        self.schedule = tempme_schedule(
            len(tower.encoder.layers),
            tower.embeddings.num_positions,
            frames,
            merge_layers,
            merge_frames,
            r,
            proportions,
        )
        self.frames, self.proportional = frames, proportional
        self.tower: Any = tower
        self.projection: Any = projection
        self.positions = nn.ParameterDict()
        like = tower.embeddings.class_embedding
        for layer, step in enumerate(self.schedule):
            if positions and step.cross:
                empty = torch.zeros(step.clips * step.join, like.shape[0], dtype=like.dtype, device=like.device)
                self.positions[str(layer)] = nn.Parameter(empty)
        self.training = tower.training

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> MergedVideo:
        """Return frame embeddings and merged tokens. No host synchronisation; the videos of a batch are independent.

        Args:
            pixel_values: `[B, T, 3, H, W]`, as the tower's processor makes each frame.
            mask: `[B, T]` bool, True where a frame exists. Other frames are not read, not attended to and not counted
                in a mean. None = all frames exist.

        Raises:
            TypeError, ValueError: An argument does not fit; the message names it.
        """
        *_, last = self.layers(pixel_values, mask)
        step, B, N = self.schedule[-1], len(pixel_values), self.tower.embeddings.num_positions
        M = step.clips * step.tokens
        size, source = last.size, last.source
        if size is None:
            size = last.tokens.new_ones((*last.tokens.shape[:2], 1), dtype=_wide(last.tokens))
        if source is None:
            source = torch.arange(N, device=size.device).expand(B * step.clips, N)
        clip = torch.arange(step.clips, device=size.device)[:, None] * step.tokens
        source = (source.reshape(B, step.clips, step.cls * N) + clip).flatten(1)
        frames = self.tower.post_layernorm(last.tokens[:, : step.cls])
        if self.projection is not None:
            frames = self.projection(frames)
        frames = frames.reshape(B, self.frames, frames.shape[-1])
        if mask is not None:
            frames = frames.masked_fill(~mask[..., None], 0)
        return MergedVideo(frames, last.tokens.reshape(B, M, -1), size.reshape(B, M, 1), source)

    def inside(self, model: nn.Module, positions: nn.Module) -> TempMe:
        """Return this module with the tower of `model`, a replica on another device, and its clip embeddings."""
        tower, projection = vision_tower(model)
        if getattr(tower, "visual", tower) is getattr(self.tower, "visual", self.tower):
            return self
        other: TempMe = self._replicate_for_data_parallel()
        other.tower, other.projection, other.positions = tower, projection, positions  # type: ignore[assignment]
        return other

    def layers(self, pixel_values: Tensor, mask: Tensor | None = None) -> Iterator[MergedClips]:
        """Yield the output of each layer of the tower in turn; arguments and errors as in `forward`."""
        pixels = self._check(pixel_values, mask)
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixels.flatten(0, 1)))
        held = MergedClips(x, None, None)
        if mask is not None:
            held = held._replace(size=mask.to(_wide(x)).reshape(-1, 1, 1).expand(*x.shape[:2], 1))
        for number, (layer, step) in enumerate(zip(self.tower.encoder.layers, self.schedule, strict=True)):
            position = self.positions.get(str(number))
            if step.join == 1 and step.intra == 0 and held.size is None:
                held = held._replace(tokens=layer(held.tokens, None))
            elif layer.training and getattr(layer, "gradient_checkpointing", False):
                done = checkpoint(self._layer, layer, step, position, mask, *held, use_reentrant=False)
                held = MergedClips(*done)
            else:
                held = self._layer(layer, step, position, mask, *held)
            yield held

    def _layer(
        self,
        layer: Any,
        step: MergeStep,
        position: Tensor | None,
        mask: Tensor | None,
        x: Tensor,
        size: Tensor | None,
        source: Tensor | None,
    ) -> MergedClips:
        if step.join > 1:
            metric = _compared(x, size, mask)
            plan = bipartite_match(metric, step.cross, cls=step.cls // step.join, groups=step.join)
            if position is not None:
                x = (x.unflatten(0, (-1, len(position))) + position[:, None].to(x.dtype)).flatten(0, 1)
            x, size = token_merge(x, plan, size)
            source = merge_source(plan, source)
        mixed, key = _attend(layer.self_attn, layer.layer_norm1(x), self._counted(size, mask))
        x = x + mixed
        if step.intra:
            metric = _compared(key.detach().mean(2, dtype=_wide(key)), size, mask)
            plan = bipartite_match(metric, step.intra, cls=step.cls)
            x, size = token_merge(x, plan, size)
            source = merge_source(plan, source)
        return MergedClips(x + layer.mlp(layer.layer_norm2(x)), size, source)

    def _counted(self, size: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Return the weight of each token in attention; None if all weights are 1."""
        if size is None or (mask is None and not self.proportional):
            return None
        if not self.proportional:
            size = size.clamp(max=1)
        if mask is None:
            return size
        # softmax without any key is NaN, so a clip of padding attends to itself
        return torch.where(size.sum(1, keepdim=True) > 0, size, 1)

    def _check(self, pixel_values: Tensor, mask: Tensor | None) -> Tensor:
        """Check the arguments and return the pixels, 0 where frames do not exist."""
        check_tensor("pixel_values", pixel_values, "[B, T, 3, H, W]", floating=True)
        B, side = len(pixel_values), self.tower.embeddings.image_size
        want = (self.frames, self.tower.embeddings.patch_embedding.in_channels, side, side)
        if pixel_values.shape[1:] != want:
            shape = shape_of(pixel_values)
            raise ValueError(f"pixel_values: expected [B, {', '.join(map(str, want))}], got shape {shape}")
        if mask is None:
            return pixel_values
        check_tensor("mask", mask, "[B, T]")
        if mask.dtype != torch.bool or mask.shape != (B, self.frames):
            raise ValueError(f"mask: expected bool [{B}, {self.frames}], got {mask.dtype} of shape {shape_of(mask)}")
        check_device("mask", mask, "pixel_values", pixel_values)
        return pixel_values.masked_fill(~mask[:, :, None, None, None], 0)


def _compared(metric: Tensor, size: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the metric with one constant row for all padding.

    Padded frames differ by rounding only, and the rounding varies with the batch. Exactly equal rows merge with one
    another first, in an order that depends on their position alone.
    """
    if mask is None or size is None:
        return metric
    return torch.where(size > 0, metric, 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
