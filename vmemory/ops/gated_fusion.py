"""Blend two memory readings by a learned gate, without storing their concatenation or the gate."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmemory.ops._checks import check_choice, check_floating, check_same, check_tensor, shape_of
from vmemory.ops._registry import Op
from vmemory.ops._select import Backends, Impl, with_backends
from vmemory.reference import gated_fusion as _reference

_ACTIVATIONS = ("relu", "gelu", "silu")
_BACKENDS = Backends("gated_fusion", cuda=True, cuda_dtypes=(torch.float64, torch.float32))


def _fake(
    working: Tensor, episodic: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    tokens, channels = working.shape
    hidden = (tokens, w1.shape[0]) if save else (0,)
    return working.new_empty((tokens, channels)), working.new_empty(hidden)


def _backward_fake(
    grad: Tensor, working: Tensor, episodic: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, hidden: Tensor,
    activation: str, for_working: bool, for_episodic: bool, for_w1: bool, for_b1: bool, for_w2: bool, for_b2: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (working.shape, working.shape, w1.shape, w1.shape[:1], w2.shape, b2.shape)
    wanted = (for_working, for_episodic, for_w1, for_b1, for_w2, for_b2)
    return tuple(working.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


# returns the result [n, D] and, with `save`, [n, Hd] for the backward pass: relu's value, otherwise the argument
_forward = Op(
    "gated_fusion",
    "(Tensor working, Tensor episodic, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str activation, bool save)"
    " -> (Tensor, Tensor)",
    _fake,
)
# a gradient that is not required has size 0
_backward = Op(
    "gated_fusion_backward",
    "(Tensor grad, Tensor working, Tensor episodic, Tensor w1, Tensor w2, Tensor b2, Tensor hidden, str activation,"
    " bool for_working, bool for_episodic, bool for_w1, bool for_b1, bool for_w2, bool for_b2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _GatedFusion(Function):
    @staticmethod
    def forward(
        ctx: Any, working: Tensor, episodic: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        activation: str, impl: str,
    ) -> Tensor:  # fmt: skip
        out, hidden = _forward(impl, working, episodic, w1, b1, w2, b2, activation, True)
        ctx.activation, ctx.impl = activation, impl
        ctx.save_for_backward(working, episodic, w1, w2, b2, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:6]
        grads = _backward(ctx.impl, grad, *ctx.saved_tensors, ctx.activation, *wanted)
        return *(g if asked else None for g, asked in zip(grads, wanted, strict=True)), None, None


@with_backends(_BACKENDS)
def gated_fusion(
    working: Tensor,
    episodic: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: Literal["relu", "gelu", "silu"] = "relu",
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Blend two readings: γ·working + (1−γ)·episodic with γ = σ(w2·act(w1·[working; episodic] + b1) + b2).

    The concatenation and γ are never stored. On the CPU the hidden activation stays in the cache; on a CUDA device it
    is written to memory. If a gradient is required, `n · Hd` elements are stored for n tokens, and the backward pass
    computes γ again.

    Args:
        working: `[..., D]`, float64, float32, float16 or bfloat16, any strides; every size may be 0.
        episodic: As `working`.
        w1: `[Hd, 2D]`, the first D columns for `working`, as in `torch.nn.Linear`; same dtype and device.
        b1: `[Hd]`.
        w2: `[D, Hd]`.
        b2: `[D]`.
        activation: `"relu"`, `"gelu"` (by the error function) or `"silu"`.
        impl: Which implementation to run; `"auto"` picks by device and dtype.

    Returns:
        `[..., D]` in the inputs' dtype, accumulated in float32 or better. Differentiable once, in all six tensors.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Unsupported dtype, shape, device or activation.
        RuntimeError: `impl` names an implementation that cannot run here.

    Source: VLM² (arXiv 2511.20644), equations 6 and 7; the paper leaves depth, width and activation of the gate open.
    """
    check_choice("activation", activation, _ACTIVATIONS)
    if not isinstance(working, Tensor) or working.dim() == 0:
        check_tensor("working", working, "[..., D]")
    check_floating("working", working)
    check_tensor("episodic", episodic, "[..., D]", working.dim())
    check_tensor("w1", w1, "[Hd, 2D]")
    channels, width = working.shape[-1], w1.shape[0]
    for name, x, layout, shape in (
        ("episodic", episodic, "[..., D]", working.shape),
        ("w1", w1, "[Hd, 2D]", (width, 2 * channels)),
        ("b1", b1, "[Hd]", (width,)),
        ("w2", w2, "[D, Hd]", (channels, width)),
        ("b2", b2, "[D]", (channels,)),
    ):
        check_tensor(name, x, layout, len(shape))
        if x.shape != shape:
            raise ValueError(f"{name}: expected {layout} = {list(shape)}, got shape {shape_of(x)}")
        check_same(name, x, "working", working)
    picked = _BACKENDS.pick(working, impl)
    if picked == "reference":
        return _reference.gated_fusion(working, episodic, w1, b1, w2, b2, activation)
    a, b = working, episodic
    if a.dim() != 2:
        # a view takes microseconds, so none is made if the shape fits
        a, b = (x[None] if x.dim() == 1 else x.flatten(0, -2) for x in (a, b))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, w1, b1, w2, b2)):
        out = _GatedFusion.apply(a, b, w1, b1, w2, b2, activation, picked)
    else:
        out = _forward(picked, a, b, w1, b1, w2, b2, activation, False)[0]
    return out if working.dim() == 2 else out.view(working.shape)
