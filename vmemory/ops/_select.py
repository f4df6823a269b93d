"""Select the implementation of an operator from device, dtype and shape, never from values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch

from vmemory.ops._native import STATUS

Impl = Literal["auto", "native", "triton", "reference"]
# best first
IMPLEMENTATIONS = ("native", "triton", "reference")
HAS_TRITON = find_spec("triton") is not None
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Explanation:
    """The implementation that `impl="auto"` picks for a call, and the reasons against the others."""

    op: str
    impl: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.impl}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Backends:
    """The implementations of an operator in addition to its reference."""

    op: str
    cpu: bool = True
    cuda: bool = False
    triton: bool = True
    native_dtypes: tuple[torch.dtype, ...] = _FLOATING
    triton_dtypes: tuple[torch.dtype, ...] = _FLOATING[1:]
    cuda_dtypes: tuple[torch.dtype, ...] | None = None
    """Dtypes of the native CUDA kernel, if they differ from those of the CPU kernel."""
    passed_over: Callable[[str, torch.Tensor], str] | None = None
    """Function that returns why `"auto"` does not pick an implementation for a tensor, or an empty string."""

    def why_not(self, impl: str, device: str, dtype: torch.dtype) -> str:
        """Return why `impl` cannot run on this device type and dtype, or an empty string."""
        if impl == "reference":
            return ""
        if impl == "native":
            if device not in ("cpu", "cuda"):
                return f"no native kernel for device type {device}"
            if not getattr(self, device):
                return f"the op has no native {device.upper()} kernel"
            taken = self.cuda_dtypes if device == "cuda" and self.cuda_dtypes else self.native_dtypes
            if dtype not in taken:
                return f"the native kernel does not take {dtype}"
            return STATUS.cpu_reason if device == "cpu" else STATUS.cuda_reason
        if not self.triton:
            return "the op has no Triton kernel"
        if device != "cuda":
            return f"Triton kernels run on CUDA devices, the tensors are on {device}"
        if dtype not in self.triton_dtypes:
            return f"the Triton kernel does not take {dtype}"
        return "" if HAS_TRITON else "triton is not installed"

    def why_not_auto(self, impl: str, tensor: torch.Tensor) -> str:
        """Return why `impl="auto"` does not pick `impl` for this tensor, or an empty string."""
        why = self.why_not(impl, tensor.device.type, tensor.dtype)
        return why if why or self.passed_over is None else self.passed_over(impl, tensor)

    def pick(self, tensor: torch.Tensor, impl: Impl = "auto") -> str:
        """Return the implementation to run: the one named, or for `"auto"` the best one.

        Any kernel that can run comes before the reference.

        Raises:
            ValueError: No implementation has this name.
            RuntimeError: The one named cannot run.
        """
        if impl == "auto":
            able = ""
            for name in IMPLEMENTATIONS[:-1]:
                if not self.why_not(name, tensor.device.type, tensor.dtype):
                    if self.passed_over is None or not self.passed_over(name, tensor):
                        return name
                    able = able or name
            return able or IMPLEMENTATIONS[-1]
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: expected 'auto', 'native', 'triton' or 'reference', got {impl!r}")
        reason = self.why_not(impl, tensor.device.type, tensor.dtype)
        if reason:
            raise RuntimeError(f"{self.op}: impl={impl!r} cannot run: {reason}")
        return impl


def explain(op: Callable[..., object], *args: object, **kwargs: object) -> Explanation:
    """Explain which implementation `op(*args)` runs and why the others are not picked.

    Args:
        op: A public op, for example `vmemory.ops.grid_pool`.
        args, kwargs: The arguments of the call. The device, dtype and shape of the first tensor decide, and for
            operators with kernels for quantised storage the dtype of the stored values.

    Raises:
        TypeError: `op` is not one of vmemory's ops, or no argument is a tensor.
    """
    backends = getattr(op, "backends", None)
    if not isinstance(backends, Backends):
        raise TypeError(f"op: expected one of vmemory's ops, got {op!r}")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    if not tensors:
        raise TypeError("args: expected at least one tensor to decide by, got none")
    tensor = tensors[0]
    tables: dict[torch.dtype, Backends] = op.by_storage  # type: ignore[attr-defined]
    backends = next((tables[a.dtype] for a in tensors if a.dtype in tables), backends)
    chosen = backends.pick(tensor)
    rejected = {
        impl: backends.why_not_auto(impl, tensor) or f"{chosen} is preferred on {tensor.device.type}"
        for impl in IMPLEMENTATIONS
        if impl != chosen
    }
    return Explanation(backends.op, chosen, rejected)


def with_backends(
    backends: Backends, by_storage: dict[torch.dtype, Backends] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Attach an operator's table of implementations to its public function, for `explain`.

    `by_storage` holds further tables, by the dtype in which a tensor of the call is stored.
    """

    def attach(function: Callable[..., Any]) -> Callable[..., Any]:
        function.backends = backends  # type: ignore[attr-defined]
        function.by_storage = by_storage or {}  # type: ignore[attr-defined]
        return function

    return attach
