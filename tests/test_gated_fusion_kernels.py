from __future__ import annotations

import pytest
import torch

from tests.fusion import ACTIVATIONS, DTYPES, SHAPES, gradients, inputs, wide
from vmemory.ops import gated_fusion
from vmemory.reference import gated_fusion as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, poisoned, random_tensor

MODULE = "vmemory.kernels.gated_fusion"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(5, 8, 8), (37, 63, 100), (70, 100, 63), (70, 64, 32), (5, 3, 2), (0, 8, 8), (3, 0, 5), (3, 4, 0)]
)
def test_triton_matches_reference(triton, shape, dtype, activation):
    x = inputs(*shape, dtype)
    low, exact = reference.gated_fusion(*x, activation), reference.gated_fusion(*wide(x), activation)
    assert_within_budget(triton(MODULE, "gated_fusion", *x, activation, False)[0], low, exact)
    out, hidden = triton(MODULE, "gated_fusion", *x, activation, True)
    assert_within_budget(out, low, exact)
    grad = random_tensor(*out.shape, seed=9).to(dtype)
    arguments = grad, x[0], x[1], x[2], x[4], x[5], hidden, activation
    grads = triton(MODULE, "gated_fusion_backward", *arguments, *(True,) * 6)
    low, exact = gradients("reference", x, activation), gradients("reference", wide(x), activation)
    assert_within_budget(grads, low, exact)
    alone = triton(MODULE, "gated_fusion_backward", *arguments, False, True, False, False, True, False)
    assert [g.numel() == 0 for g in alone] == [not asked or g.numel() == 0 for g, asked in
                                               zip(grads, (0, 1, 0, 0, 1, 0), strict=True)]  # fmt: skip
    assert torch.equal(alone[1], grads[1])
    assert torch.equal(alone[4], grads[4])


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("hidden", "relu"),
        ("hidden", "gelu"),
        ("fwd", ""),
        ("bwd_gate", ""),
        ("bwd_hidden", "gelu"),
        ("activate", "silu"),
    ],
)
def test_triton_compiles(name, activation, dtype, aligned, arch):
    from vmemory.kernels import gated_fusion as kernels

    kernel = getattr(kernels, f"_gated_fusion_{name}_kernel")
    constants: dict = {"ACTIVATION": activation, "KEEP_ARGUMENT": True, "WORKING": True, "EPISODIC": True}
    tiling = kernels.tiling(
        4096, 1152 if aligned else 1001, dtype == "fp32", aligned, name == "bwd_hidden" and activation != "relu"
    )
    options = {key: tiling.pop(key) for key in ("num_warps", "num_stages")}
    constants = {k: v for k, v in (constants | tiling | {"BLOCK": 1024}).items() if k in kernel.arg_names}
    signature = {k: "i32" if k in ("n", "D", "H", "size") else f"*{dtype}" for k in kernel.arg_names}
    hints = [k for k in signature if k not in constants and k != "n"] if aligned else []
    compiled = compile_triton(kernel, signature, constants, arch, hints, **options)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [*(("triton", dtype) for dtype in DTYPES), ("native", torch.float32), ("native", torch.float64)],
)
@pytest.mark.parametrize("shape", [*SHAPES, (3000, 1152, 1152)])
def test_cuda_matches_reference(shape, impl, dtype, activation):
    x = inputs(*shape, dtype, "cuda")
    low, exact = reference.gated_fusion(*x, activation), reference.gated_fusion(*wide(x), activation)
    with poisoned():
        assert_within_budget(gated_fusion(*x, activation, impl=impl), low, exact)
        grads = gradients(impl, x, activation)
    low, exact = gradients("reference", x, activation), gradients("reference", wide(x), activation)
    assert_within_budget(grads, low, exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "dtype"), [("triton", torch.bfloat16), ("native", torch.float32)])
def test_cuda_graph_replays_on_dirty_buffers(impl, dtype):
    x = inputs(300, 128, 64, dtype, "cuda")
    expected = gated_fusion(*x, impl=impl)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = gated_fusion(*x, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
