from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vmemory
import vmemory.ops
from vmemory.ops._native import STATUS
from vmemory.ops._registry import OPS
from vmemory.ops._select import Backends, with_backends

PUBLIC = {name: getattr(vmemory.ops, name) for name in vmemory.ops.__all__}
PUBLIC = {name: function for name, function in PUBLIC.items() if hasattr(function, "backends")}


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@pytest.mark.usefixtures("native")
def test_native_is_picked_on_cpu():
    for name, function in PUBLIC.items():
        for dtype in function.backends.native_dtypes:
            explanation = vmemory.explain(function, torch.empty(1, 2, 4, 8, dtype=dtype))
            assert explanation.impl == "native", (name, dtype)
            no_device = "not triton: Triton kernels run on CUDA devices" in str(explanation)
            assert no_device == function.backends.triton, (name, dtype)


@pytest.mark.usefixtures("native")
def test_every_operator_has_a_native_kernel_on_cpu():
    assert [name for name in OPS if not has_kernel(f"vmemory::{name}", "CPU")] == []


@pytest.mark.usefixtures("native")
def test_every_cuda_kernel_is_announced():
    """A table that promises a CUDA kernel has one, where the library was built with CUDA."""
    announced = {f.backends.op for f in PUBLIC.values() if f.backends.cuda}
    if not STATUS.facts.get("cuda"):
        pytest.skip(STATUS.cuda_reason)
    # without a device it is not loaded, but what it registers can be seen
    torch.ops.load_library(Path(vmemory.__file__).parent / "_ops_cuda.so")
    assert {name for name in OPS if name in PUBLIC and has_kernel(f"vmemory::{name}", "CUDA")} == announced


def test_triton_twins_launch_a_kernel_that_exists():
    """The launcher is looked up at the first launch, which no test without a GPU gets to."""
    pytest.importorskip("triton", reason="triton is not installed")
    twins = {name: op for name, op in OPS.items() if op.triton is not None}
    assert len(twins) > 10
    for name, op in twins.items():
        assert has_kernel(f"vmemory_triton::{name}", "CUDA")
        with pytest.raises(TypeError, match=rf"^{name}\(\) missing"):
            op._launch()


def test_every_public_operator_belongs_to_a_table():
    tables = {function.backends.op for function in PUBLIC.values()}
    assert tables <= set(OPS)
    assert all(any(name.startswith(table) for table in tables) for name in OPS)


def test_backward_operators_have_their_forward():
    for name in OPS:
        assert name.removesuffix("_backward") in OPS


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vmemory.explain(torch.relu, torch.ones(1)), "op: expected one of vmemory's ops"),
        (lambda: vmemory.explain(vmemory.ops.grid_pool, 3), "args: expected at least one tensor"),
    ],
)
def test_explain_refuses(call: Callable[[], Any], words: str):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.usefixtures("native")
def test_storage_decides_where_its_kernels_differ():
    apart = Backends("an_op", cpu=False, triton=False)
    op = with_backends(Backends("an_op"), {torch.uint8: apart})(lambda query, memory: query)
    query, packed = torch.empty(1), torch.empty(1, dtype=torch.uint8)
    assert vmemory.explain(op, query, torch.empty(1, dtype=torch.int8)).impl == "native"
    for explanation in (vmemory.explain(op, query, packed), vmemory.explain(op, query, memory=packed)):
        assert explanation.impl == "reference"
        assert explanation.rejected["native"] == "the op has no native CPU kernel"
    search = vmemory.ops.similarity_topk
    assert search.backends.cuda
    assert not search.by_storage[torch.uint8].cuda


def test_reasons_name_what_is_missing():
    backends = Backends("an_op", cpu=False, triton=False, native_dtypes=(torch.float32,))
    tensor = torch.empty(1)
    assert backends.pick(tensor) == "reference"
    assert backends.why_not("native", "cpu", torch.float32) == "the op has no native CPU kernel"
    assert backends.why_not("triton", "cuda", torch.float32) == "the op has no Triton kernel"
    with pytest.raises(RuntimeError, match="an_op: impl='native' cannot run: the op has no native CPU kernel"):
        backends.pick(tensor, "native")
    with pytest.raises(ValueError, match="impl: expected 'auto', 'native', 'triton' or 'reference', got 'fast'"):
        backends.pick(tensor, "fast")
