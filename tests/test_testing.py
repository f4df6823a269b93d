from __future__ import annotations

import pytest
import torch

from vmemory.testing import assert_within_budget, compile_triton, layouts, poisoned, random_tensor


def test_budget_accepts_twice_the_error_of_the_reference_and_no_more():
    wide = random_tensor(64, dtype=torch.float64)
    low = (wide + 1e-3).float()
    assert_within_budget((wide - 1.99e-3).float(), low, wide)
    with pytest.raises(AssertionError, match=r"output: error .* exceeds"):
        assert_within_budget((wide - 2.01e-3).float(), low, wide)


def test_budget_gives_one_rounding_where_the_reference_is_exact():
    exact = torch.tensor([1.0, 0.25])
    assert_within_budget(torch.nextafter(exact, exact + 1), exact, exact.double())
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(exact * (1 + 3e-7), exact, exact.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_budget_wants_the_same_non_finite_entries(value):
    good = random_tensor(8)
    bad = good.clone()
    bad[3] = value
    assert_within_budget(bad, bad, bad.double())
    with pytest.raises(AssertionError, match="differ in being"):
        assert_within_budget(bad, good, good.double())
    with pytest.raises(AssertionError, match="differ in being"):
        assert_within_budget(good, bad, bad.double())


def test_budget_checks_structure_shape_dtype_and_whole_numbers():
    x = random_tensor(4)
    for actual, words in (((x, x), "equally many"), ((x[:2],), "shapes"), ((x.half(),), "expected torch.float32")):
        with pytest.raises(AssertionError, match=words):
            assert_within_budget(actual, (x,), (x.double(),))
    indices = torch.arange(4)
    assert_within_budget(indices, indices, indices)
    with pytest.raises(AssertionError, match="1 of 4 entries differ"):
        assert_within_budget(indices.clamp_max(2), indices, indices)


def test_poisoned_memory_is_nan_in_python_and_in_native_ops():
    with poisoned():
        assert torch.isnan(torch.empty(100)).all()
        assert torch.isnan(torch.ones(1, dtype=torch.bfloat16).new_empty(100)).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_layouts_keep_the_values():
    x = random_tensor(2, 3, 4)
    variants = layouts(x)
    assert len({(v.stride(), v.storage_offset()) for v in variants.values()}) == len(variants)
    for variant in variants.values():
        assert torch.equal(variant, x)


def test_kernels_run_on_the_cpu_in_bfloat16_and_errors_are_the_callers(triton):
    x = random_tensor(1, 2, 2, 4, dtype=torch.bfloat16)
    mean = triton("vmemory.kernels.grid_pool", "grid_pool", x, [1, 1], "area")
    assert_within_budget(mean, x.mean((1, 2), keepdim=True), x.double().mean((1, 2), keepdim=True))
    with pytest.raises(AttributeError, match="no_such_launcher"):
        triton("vmemory.kernels.grid_pool", "no_such_launcher")


def test_a_program_gets_no_more_shared_memory_than_an_a100_has(triton, monkeypatch):
    from triton import OutOfResources

    from vmemory.kernels import gated_fusion

    big = {"EVEN": True, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
    monkeypatch.setattr(gated_fusion, "tiling", lambda *_: dict(big))
    shapes = (256, 256), (256, 256), (256, 256), (256,), (256, 256), (256,)
    x = [random_tensor(*shape, dtype=torch.bfloat16) for shape in shapes]
    with pytest.raises(OutOfResources, match="shared memory"):
        triton("vmemory.kernels.gated_fusion", "gated_fusion", *x, "relu", False)


@pytest.mark.usefixtures("triton_compiler")
def test_compile_refuses_what_is_no_kernel():
    with pytest.raises(TypeError, match=r"expected a compiled @triton\.jit function"):
        compile_triton(len, {}, {})
