"""Add spatial features to visual tokens, by cross-attention to the output of a geometry encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmemory.models.memories import GivenMemory
from vmemory.ops._checks import check_int, check_tensor, shape_of


class GeometryFusion(nn.Module):
    """Add geometry to visual tokens by gated cross-attention: x + tanh(g) · attention(x, z).

    The gate g starts at 0, so an untrained module does not change the model. It works between projector and memory, for
    pictures and videos. Pass it to `vmemory.attach` as the memory; its `memory` argument is the memory after it.

    Args:
        dim: Channels D of a visual token.
        geometry_dim: Channels E of a geometry token.
        encoder: Maps frames `[T, 3, h, w]`, the input of the vision tower, to geometry tokens `[T, P, E]`. The caller
            decides whether it is trained.
        heads: Attention heads, a divisor of `width`.
        width: Channels of queries, keys and values; None = `dim`.
        memory: The memory after this module, as in `attach` but not a name; None = a memory made from the `config` of
            `attach`. An untrained `DualMemory` needs `residual=True` to leave the model unchanged.
        device, dtype: Device and dtype of the weights.

    Raises:
        TypeError, ValueError: An argument does not fit; the message names it.

    Source: the cross-attention fusion of VLM-3R (arXiv 2505.20279), without dropout and with a gate instead of its last
    norm.
    """

    def __init__(
        self,
        dim: int,
        geometry_dim: int,
        encoder: Callable[[Tensor], Tensor],
        *,
        heads: int = 8,
        width: int | None = None,
        memory: GivenMemory | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        for name, value in (("dim", dim), ("geometry_dim", geometry_dim), ("heads", heads), ("width", width)):
            check_int(name, value, low=1)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width ({width}), got {heads}")
        if not callable(encoder):
            raise TypeError(f"encoder: expected a callable of frames [T, 3, h, w], got {type(encoder).__name__}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.geometry_dim, self.heads = dim, geometry_dim, heads
        self.encoder = encoder
        self.memory = memory
        self.norm, self.geometry_norm = nn.LayerNorm(dim, **like), nn.LayerNorm(geometry_dim, **like)
        self.query = nn.Linear(dim, width, **like)
        self.key_value = nn.Linear(geometry_dim, 2 * width, **like)
        self.out = nn.Linear(width, dim, **like)
        # one element and not a scalar, because FSDP does not shard scalars
        self.gate = nn.Parameter(torch.zeros(1, **like))

    def forward(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Return tokens `[T, n, D]` with the geometry of their frames `[T, 3, h, w]`.

        Raises:
            TypeError, ValueError: `tokens` or the encoder's output has another shape or type.
        """
        check_tensor("tokens", tokens, "[T, n, D]")
        if tokens.shape[-1] != self.dim:
            raise ValueError(f"tokens: expected [T, n, {self.dim}], got shape {shape_of(tokens)}")
        geometry = self.encoder(frames)
        check_tensor("geometry", geometry, "[T, P, E]")
        if geometry.shape[0] != tokens.shape[0] or geometry.shape[-1] != self.geometry_dim:
            want = f"[{tokens.shape[0]}, P, {self.geometry_dim}]"
            raise ValueError(f"geometry: expected {want} from the encoder, got shape {shape_of(geometry)}")
        kind = self.query.weight.dtype
        key, value = self._split(self.key_value(self.geometry_norm(geometry.to(kind)))).chunk(2, 1)
        found = F.scaled_dot_product_attention(self._split(self.query(self.norm(tokens.to(kind)))), key, value)
        joined = self.out(found.transpose(1, 2).flatten(2))
        return tokens + (self.gate.tanh() * joined).to(tokens.dtype)

    def _split(self, x: Tensor) -> Tensor:
        width = self.query.out_features // self.heads
        return x.unflatten(-1, (-1, width)).transpose(1, 2)
