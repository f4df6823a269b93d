"""Shared parts of the frame compressors: input checks, result type and a small convolutional frame encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_device, check_int, check_tensor, shape_of
from vmemory.ops.select_tokens import compact


class CompressedFrames(NamedTuple):
    """K frames made from T frames, in time order; K does not depend on their content.

    Attributes:
        frames: `[B, K, C, H, W]`, the dtype of the input; padding is 0.
        mask: `[B, K]` bool, False = padding, always at the end.
        indices: `[B, K]` int64, the input frame returned, or the one with the largest share; strictly increasing, then
            −1.
        weights: `[B, K, T]` float32 (float64 for float64 modules), differentiable: shares of the input frames. Rows sum
            to 1, padding is 0. Mixed frames are means with these weights; picked frames pass their gradient through
            them.
        scores: `[B, T]` same dtype, differentiable: the score of each input frame, −inf where it does not exist.
    """

    frames: Tensor
    mask: Tensor
    indices: Tensor
    weights: Tensor
    scores: Tensor


def check_video(frames: Tensor, mask: Tensor | None, channels: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Check the input and return frames `[B, T, C, H, W]`, 0 where missing, and a mask of existing frames `[B, T]`.

    Raises:
        TypeError, ValueError: `frames` or `mask` does not fit, or there are more than `most` frames.
    """
    check_tensor("frames", frames, "[B, T, C, H, W]", floating=True)
    B, T, _, H, W = frames.shape
    if frames.shape[2] != channels:
        raise ValueError(f"frames: expected {channels} channels [B, T, C, H, W], got shape {shape_of(frames)}")
    if T < 1 or H < 1 or W < 1:
        raise ValueError(f"frames: expected at least 1 frame of 1 pixel, got shape {shape_of(frames)}")
    if most is not None and frames.shape[1] > most:
        raise ValueError(f"frames: expected at most {most} frames, got {T}")
    if mask is None:
        return frames, torch.ones((B, T), dtype=torch.bool, device=frames.device)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a bool tensor [{B}, {T}], got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != (B, T):
        raise ValueError(f"mask: expected bool [{B}, {T}], got {mask.dtype} of shape {shape_of(mask)}")
    check_device("mask", mask, "frames", frames)
    return torch.where(mask[:, :, None, None, None], frames, 0), mask


def check_rate(name: str, value: Any) -> None:
    """Check that a rate, such as dropout, lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def wide(x: Tensor) -> Tensor:
    """Return float64 unchanged and any narrower dtype as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shares(logits: Tensor, allowed: Tensor) -> Tensor:
    """Apply softmax over the allowed elements of the last dimension; a row without any is 0."""
    low = torch.finfo(logits.dtype).min
    return torch.where(allowed, logits.masked_fill(~allowed, low).softmax(-1), 0)


class _Pick(Function):
    """Select frames by index; in backward the weights of a row get the gradient of their weighted mean."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(frames, indices)
        ctx.kind = weights.dtype
        return compact(frames, indices).tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        frames, indices = ctx.saved_tensors
        to_frames = to_weights = None
        if ctx.needs_input_grad[0]:
            stream = torch.arange(frames.shape[0], device=frames.device)[:, None]
            there = (indices >= 0)[:, :, None, None, None]
            rows = torch.where(there, grad, 0).to(frames.dtype)
            to_frames = torch.zeros_like(frames).index_put((stream, indices.clamp_min(0)), rows, accumulate=True)
        if ctx.needs_input_grad[1]:
            to_weights = torch.bmm(grad.flatten(2), frames.flatten(2).to(grad.dtype).mT).to(ctx.kind)
        return to_frames, to_weights, None


def pick(frames: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Select `frames [B, T, C, H, W]` at `indices [B, K]`; the gradient also reaches `weights [B, K, T]`."""
    if torch.is_grad_enabled() and (frames.requires_grad or weights.requires_grad):
        return _Pick.apply(frames, weights, indices)
    return compact(frames, indices).tokens


def mix(frames: Tensor, weights: Tensor) -> Tensor:
    """Return weighted means `[B, K, C, H, W]` of `frames [B, T, C, H, W]` with `weights [B, K, T]`."""
    # autocast must not lower the precision of pixels
    with torch.autocast(frames.device.type, enabled=False):
        mixed = torch.bmm(weights.to(frames.dtype), frames.flatten(2))
    return mixed.reshape(*weights.shape[:2], *frames.shape[2:])


class FrameEncoder(nn.Module):
    """Encode each frame alone as one vector: two strided convolutions, pooling to 7 × 7 cells, a projection.

    Args:
        dim: Size of the vectors.
        channels: Channels C of a frame.
    """

    def __init__(self, dim: int, channels: int = 3) -> None:
        super().__init__()
        check_int("dim", dim, low=1)
        check_int("channels", channels, low=1)
        # with group norm a frame's vector depends neither on the batch nor on training or evaluation mode
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 64, 7, stride=4, padding=3),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.GroupNorm(8, 128),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(7),
            nn.Flatten(),
            nn.Linear(128 * 49, dim),
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Return vectors `[B, T, dim]` of frames `[B, T, C, H, W]`, in the module's dtype."""
        B, T = frames.shape[:2]
        weight = self.layers[0].weight
        assert isinstance(weight, Tensor)
        return self.layers(frames.flatten(0, 1).to(weight.dtype)).unflatten(0, (B, T))
