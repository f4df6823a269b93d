"""Convert frames to a tower's pixels, with one size for a whole stream and without torchvision.

The processors of transformers divide one pixel budget among all frames of a call: with 128 frames a frame shrinks to a
few patches. A stream has no fixed number of frames, so its frame size is fixed once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Triple = tuple[float, float, float]
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


def normalisation(processor: object, mean: Triple, std: Triple) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of a processor's frames, or the family's own."""
    for name in ("video_processor", "image_processor"):
        part = getattr(processor, name, None)
        if part is not None and getattr(part, "image_mean", None) is not None:
            return _triple(part.image_mean), _triple(part.image_std)
    return mean, std


def _triple(values: Any) -> Triple:
    r, g, b = (float(v) for v in values)
    return r, g, b


def size_for(size: tuple[int, int], unit: int, tokens: int) -> tuple[int, int]:
    """Return the size (H, W) with the aspect ratio of `size` and at most `tokens` tokens of `unit` × `unit` pixels."""
    h, w = (max(1, round(length / unit)) for length in size)
    if h * w > tokens:
        shrink = math.sqrt(tokens / (size[0] * size[1])) * unit
        h, w = (max(1, math.floor(length * shrink / unit)) for length in size)
    return h * unit, w * unit


def square_size(model: Any) -> tuple[int, int]:
    """Return the only input size of a square tower."""
    size = int(model.config.vision_config.image_size)
    return size, size


def scaled(frames: Tensor, size: tuple[int, int], mean: Triple, std: Triple) -> Tensor:
    """Scale `frames [n, 3, H, W]` uint8 to `size` (bicubic) and normalise them to float32.

    Raises:
        ValueError: The frames have another shape or dtype.
    """
    if frames.dim() != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames: expected uint8 [n, 3, H, W], got {frames.dtype} of shape {tuple(frames.shape)}")
    if tuple(frames.shape[-2:]) != size:
        wide = interpolate(frames.float(), size, mode="bicubic", antialias=True, align_corners=False)
        frames = wide.round().clamp(0, 255)
    shift, scale = (torch.tensor(x, device=frames.device)[:, None, None] for x in (mean, std))
    return (frames.float() / 255 - shift) / scale


def patch_rows(pixels: Tensor, patch: int, merge: int, together: int) -> tuple[Tensor, list[int]]:
    """Cut `pixels [n, 3, H, W]` into rows of patches `[t·h·w, 3·together·patch²]`; also return the grid (t, h, w).

    The `merge × merge` patches of a token are consecutive.

    Raises:
        ValueError: Frames do not divide into groups of `together`, or sides into `patch · merge`.
    """
    n, channels, height, width = pixels.shape
    if n % together or height % (patch * merge) or width % (patch * merge):
        raise ValueError(
            f"frames: expected a multiple of {together} frames with sides in multiples of {patch * merge} pixels, "
            f"got {n} of {height} × {width}"
        )
    t, h, w = n // together, height // patch, width // patch
    x = pixels.reshape(t, together, channels, h // merge, merge, patch, w // merge, merge, patch)
    rows = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * together * patch * patch)
    return rows, [t, h, w]
