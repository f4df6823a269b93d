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
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CompiledKernel", "TritonInterpreter", "assert_within_budget", "compile_triton", "layouts", "poisoned",
           "random_tensor"]  # fmt: skip

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


def _dot(_: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
    """Return a b + c, summed in the same order for every row and column, as on a GPU, and rounded once.

    The interpreter's own version uses NumPy, whose BLAS may sum equal rows in different orders.
    """
    kept = c.data.dtype
    total = c.data.astype("float64" if kept.kind == "f" else kept)
    rows, columns = a.data.astype(total.dtype), b.data.astype(total.dtype)
    for k in range(rows.shape[-1]):
        total += rows[..., k, None] * columns[..., None, k, :]
    return type(c)(total.astype(kept), c.dtype.scalar)


def _reduce(reduction: Any, input: tuple[Any, ...]) -> list[Any]:
    """Combine whole slices along the axis, in the interpreter's order; its own version combines single elements."""
    kept, (input, axis) = [x.dtype for x in input], reduction.unravel(input, reduction.axis)
    shape = input[0].handle.data.shape
    shape = shape[:axis] + shape[axis + 1 :]
    slices = [np.moveaxis(x.handle.data, axis, 0) for x in input]
    total = [x[0] for x in slices]
    for place in range(1, len(slices[0])):
        pairs = [reduction.to_tensor(x, dtype) for x, dtype in zip(total, kept, strict=True)]
        pairs += [reduction.to_tensor(x[place], dtype) for x, dtype in zip(slices, kept, strict=True)]
        found = reduction.combine_fn.fn(*pairs)
        found = found if isinstance(found, tuple) else (found,)
        total = [x.handle.data.astype(y.dtype).reshape(shape) for x, y in zip(found, slices, strict=True)]
    if reduction.keep_dims:
        total = [np.expand_dims(x, axis) for x in total]
    elif reduction.axis is None:
        total = [x.item() for x in total]
    return [reduction.to_tensor(x, dtype) for x, dtype in zip(total, kept, strict=True)]


def _launch(module: str, launcher: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    InterpreterBuilder.create_dot, ReduceOps.generic_reduce = _dot, _reduce
    with poisoned():
        return getattr(import_module(module), launcher)(*args, **kwargs)


class TritonInterpreter:
    """Run Triton launchers on CPU tensors, in a child process with TRITON_INTERPRET=1.

    Triton reads that variable when a kernel is defined, so one process can either interpret kernels or compile them;
    with the child, tests of both kinds fit in one pytest run. Outputs are poisoned with NaN before the launch.
    bfloat16 is refused, because the interpreter computes it wrongly.
    """

    def __init__(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            # spawned, because a forked child would inherit an already imported triton
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent, (os.getpid(),))
            self._pool.submit(import_module, "triton").exception()
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before

    def __call__(self, module: str, launcher: str, *args: Any, **kwargs: Any) -> Any:
        """Call `launcher(*args, **kwargs)` of `module`, for example of "vmemory.kernels.grid_pool".

        Raises:
            ValueError: A tensor is bfloat16.
            Exception: Whatever the launcher raised, with the child's traceback.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                raise ValueError("args: expected float32 or float16, the Triton interpreter is wrong in bfloat16")
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        return self._pool.submit(_launch, module, launcher, plain, kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()


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
        RuntimeError: Kernels are interpreted in this process (TRITON_INTERPRET=1).
    """
    from triton import compile as compile_source
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "arg_names") or type(kernel).__name__ != "JITFunction":
        raise RuntimeError(f"kernel: expected a compiled @triton.jit function, got {type(kernel).__name__}")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    hints = {(kernel.arg_names.index(k),): [["tt.divisibility", 16]] for k in aligned}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in constexprs.items()}, hints)
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
