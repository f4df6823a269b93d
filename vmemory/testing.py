"""Helpers for tests of code built on vmemory: error budget, input layouts, poisoned memory, Triton without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CompiledKernel", "assert_within_budget", "compile_triton", "layouts", "poisoned", "random_tensor",
           "triton_on_cpu"]  # fmt: skip

A100_SHARED_BYTES = 163 * 1024


def assert_within_budget(actual: Any, low_precision_reference: Any, reference64: Any, name: str = "output") -> None:
    """Assert that a kernel's error is within twice that of plain PyTorch in the same dtype.

    Per tensor, `max|actual - reference64| <= 2 * (max|low_precision_reference - reference64| + r)`, with r one rounding
    of the output dtype at the largest magnitude of `reference64`. For float64, which has no finer reference, r is 1024
    roundings. NaN and infinities must be at the same positions as in `low_precision_reference`. Integer and bool
    tensors must be equal.

    Args:
        actual: Tensor, or (nested) tuple or list of tensors, as the tested code returned it.
        low_precision_reference: The reference on the same inputs, same structure, shapes and dtypes.
        reference64: The reference on the inputs in float64, same structure and shapes.
        name: Name of the tensor in the message.

    Raises:
        AssertionError: Structure, shape, dtype, NaN or infinity pattern differ, or the error exceeds the budget.
    """
    if isinstance(low_precision_reference, (tuple, list)):
        sizes = [len(x) for x in (actual, low_precision_reference, reference64)]
        assert len(set(sizes)) == 1, f"{name}: expected equally many tensors, got {sizes}"
        parts = zip(actual, low_precision_reference, reference64, strict=True)
        for i, (a, low, wide) in enumerate(parts):
            assert_within_budget(a, low, wide, f"{name}[{i}]")
        return
    low = low_precision_reference
    assert actual.shape == low.shape == reference64.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(low.shape)}, {tuple(reference64.shape)} differ"
    )
    assert actual.dtype == low.dtype, f"{name}: expected {low.dtype}, got {actual.dtype}"
    actual, low, wide = (x.detach().cpu() for x in (actual, low, reference64))
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, low), f"{name}: {int((actual != low).sum())} of {actual.numel()} entries differ"
        return
    for kind, pattern in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = int((pattern(actual) != pattern(low)).sum())
        assert wrong == 0, f"{name}: {wrong} of {actual.numel()} entries differ in being {kind}"
    finite = torch.isfinite(low) & torch.isfinite(wide)
    if not finite.any():
        return
    truth = wide[finite].double()
    error = (actual[finite].double() - truth).abs().max().item()
    allowed = (low[finite].double() - truth).abs().max().item()
    limits = torch.finfo(actual.dtype)
    rounding = max(truth.abs().max().item() * limits.eps / 2, limits.smallest_normal * limits.eps)
    if actual.dtype == torch.float64:
        rounding *= 1024
    assert error <= 2 * (allowed + rounding), (
        f"{name}: error {error:.3e} exceeds 2 * ({allowed:.3e} of the reference + {rounding:.3e} rounding)"
    )


def random_tensor(
    *shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> Tensor:
    """Return standard normal values that depend on shape and seed only, rounded to `dtype`."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the same values in several memory layouts that kernels often mishandle.

    Returns a dict: "contiguous"; "offset" (contiguous, one element past an aligned address); "strided" (every other
    element of the last dimension); "reversed" (dimensions stored in reverse order); "padded" (rows longer than the
    last dimension). The gaps hold NaN where the dtype has it.
    """
    filler = float("nan") if x.dtype.is_floating_point else 0
    offset = x.new_full((x.numel() + 1,), filler)[1:].view(x.shape).copy_(x)
    strided = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), filler)[..., ::2].copy_(x)
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), filler)[..., : x.shape[-1]].copy_(x)
    order = tuple(reversed(range(x.dim())))
    turned = x.permute(order).contiguous().permute(order)
    return {"contiguous": x.contiguous(), "offset": offset, "strided": strided, "reversed": turned, "padded": padded}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return, from Python and from C++ ops, with NaN (integers: the maximum).

    In this context a kernel that leaves part of its output unwritten fails the test every time.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """End this process when its parent, process `parent`, ends in any way; for child processes."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Run Triton kernels on CPU tensors: what is launched within the context is compiled for sm_80 (A100) and run here.

    It is the code that a GPU would get, up to PTX: layouts in shared memory, copies to it, matrix instructions,
    bfloat16. Blocks that need more shared memory than an A100 has are refused as there. So is an access outside of the
    launch's tensors or at a misaligned address, and a place that one program writes and another touches. All threads
    of a launch run in step: a missing barrier goes unseen. Needs no GPU, and a few seconds for large tensors.

    Raises:
        vmemory._ptx.program.PtxError: In a launch: what no kernel may do, with the instruction.
    """
    from vmemory._ptx.driver import on_cpu

    with on_cpu():
        yield


@dataclass(frozen=True)
class CompiledKernel:
    """Resources of a compiled kernel: bytes of shared memory per block, registers and spilled bytes per thread."""

    shared: int
    registers: int
    spills: int


def compile_triton(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int = 90,
    aligned: Collection[str] = (),
    **options: Any,
) -> CompiledKernel:
    """Compile a `@triton.jit` kernel for a CUDA architecture on a machine without a GPU.

    Args:
        kernel: The jitted function.
        signature: Triton type per runtime argument, e.g. `{"x": "*bf16", "n": "i64"}`. Arguments in neither mapping
            and in `constexprs` are compile-time constants.
        constexprs: Value per compile-time argument.
        arch: 80 for A100, 90 for H100 and H200.
        aligned: Runtime arguments that are multiples of 16 (pointers: of 16 bytes), which a launch would detect.
        options: num_warps, num_stages and the like.

    Raises:
        TypeError: `kernel` is no jitted function.
    """
    from triton import JITFunction
    from triton import compile as compile_source
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, JITFunction):
        raise TypeError(f"kernel: expected a compiled @triton.jit function, got {type(kernel).__name__}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    hints = {(kernel.arg_names.index(k),): [["tt.divisibility", 16]] for k in aligned}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in constexprs.items()}, hints)
    # what the kernel itself gives with every launch
    options = {**getattr(kernel, "OPTIONS", {}), **options}
    compiled = compile_source(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(nvidia.__path__[0]) / "bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return CompiledKernel(compiled.metadata.shared, registers, stack + local)


def python(code: str, **environment: str) -> str:
    """Run a snippet in a new interpreter and return its output; raise an error with the output if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
