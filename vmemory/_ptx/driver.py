"""A device for Triton whose kernels are compiled for sm_80, as for an A100, and run here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from vmemory._ptx.machine import Kernel

__all__ = ["SHARED_BYTES", "on_cpu"]

# of a program on sm_80
SHARED_BYTES = 163 * 1024


class _Compiler(CUDABackend):
    """Triton's own for CUDA, without its last step, which makes machine code of PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict, *args: Any) -> None:
        super().add_stages(stages, *args)
        del stages["cubin"]

    def hash(self) -> str:
        # kernels in Triton's cache that end with PTX are not those that end with machine code
        return f"{super().hash()}-ptx"


class _Utilities:
    """The part of a device that loads kernels, as Triton calls it."""

    def load_binary(self, name: str, text: bytes, shared: int, device: str) -> tuple:
        # module, function, registers, spills, most threads
        return name, Kernel(text.decode()), 0, 0, 1024

    def unload_module(self, module: str) -> None:
        pass

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}


class _Launcher:
    """Launches one compiled kernel, with the arguments that a device would get."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: Kernel, *launch: Any) -> None:
        # before the kernel's own arguments come Triton's: two of metadata, two hooks
        given = list(_given(tuple(self.signature.values()), launch[4:]))
        arguments = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
        # Triton's own buffers, of which these kernels use none
        arguments += [0] * (len(kernel.program.parameters) - len(arguments))
        tensors = [value for value in given if isinstance(value, Tensor)]
        if x * y * z:
            kernel.launch((x, y, z), 32 * self.metadata.num_warps, self.metadata.shared, arguments, tensors)


def _given(types: Any, values: Any) -> Iterator[Any]:
    """Yield the arguments that are not constants of the compilation, and the members of tuples."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _given(kind, value)
        elif kind != "constexpr":
            yield value


class _Driver(DriverBase):
    launcher_cls = _Launcher
    utils = _Utilities()

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> str:
        return "sm_80 on the CPU"

    def get_current_stream(self, device: str) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compile Triton kernels for sm_80 and run them on CPU tensors, within a context."""
    compiler = patch.dict(backends, nvidia=Backend(compiler=_Compiler, driver=_Driver))
    with compiler, patch.object(driver, "_active", _Driver()):
        yield
