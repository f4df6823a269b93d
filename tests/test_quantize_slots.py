from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pairwise import types_in_turn
from vmemory.ops import dequantize_slots, quantize_slots, similarity_topk
from vmemory.reference import quantize_slots as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.quantize_slots"
SHAPES = [(2, 3, 63), (1, 1000), (5, 1), (7, 16), (4, 4, 1152), (33,), (0, 8), (3, 0), (2, 17)]
LARGEST = {8: 127, 4: 7}
NAN, INF = float("nan"), float("inf")


def assert_same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def odd_rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, NaN, infinities, values at the ends of the range, halves that round to even."""
    x = random_tensor(9, 37, dtype=dtype)
    x[0] = 0
    x[1, 36] = NAN
    x[2, 5] = -INF
    x[3] *= torch.finfo(dtype).tiny
    x[4] = torch.finfo(dtype).max
    x[5] = torch.arange(37).to(dtype) / 2 - 9
    x[5, 0], x[6] = 127, -x[5]
    x[6, 0] = 7
    x[7] = -0.0
    x[8, 1:] = 0
    return x


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype, bits):
    x = random_tensor(*shape, dtype=dtype)
    with poisoned():
        actual = quantize_slots(x, bits)
        assert_same(actual, reference.quantize_slots(x, bits))
        for kind in DTYPES:
            back = dequantize_slots(*actual, dim=shape[-1], dtype=kind)
            assert_same([back], [reference.dequantize_slots(*actual, None, shape[-1], kind)])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_float32_is_rounded_to_it(dtype):
    """Each level of the processor converts in its own way."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    # one value a row: the scale is its size, divided and rounded
    _, scale = quantize_slots(every[:, None], 8)
    _, expected = reference.quantize_slots(every[:, None], 8)
    assert torch.equal(scale, expected)
    # between two neighbours, on them and exactly in the middle
    fine = torch.arange(0, 2**31, 2**9 + 2**3 - 1).to(torch.int32)
    middle = torch.arange(0, 2**31, 2**12).to(torch.int32)
    scale = torch.cat([fine, middle, middle + 1, middle - 1]).view(torch.float32)
    for sign in (1, -1):
        back = dequantize_slots(torch.full((len(scale), 1), sign, dtype=torch.int8), scale, dim=1, dtype=dtype)
        torch.testing.assert_close(back[:, 0], (sign * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_zero_or_not_finite(dtype, bits, impl):
    x = odd_rows(dtype)
    values, scale = quantize_slots(x, bits, impl=impl)
    assert_same((values, scale), reference.quantize_slots(x, bits))
    assert scale.isnan().tolist()[:4] == [False, True, True, False]
    for row in (0, 7):
        assert scale[row] == 0
    assert (values[[0, 1, 2, 7]] == 0).all()
    back = dequantize_slots(values, scale, dim=37, impl=impl)
    assert back[1].isnan().all()
    assert back[2].isnan().all()
    assert (back[[0, 7]] == 0).all()


def test_a_scale_beyond_float32_is_nan():
    values, scale = quantize_slots(torch.tensor([[1e300, 1.0]], dtype=torch.float64))
    assert scale.isnan().all()
    assert (values == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_halves_round_to_even(bits):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, LARGEST[bits]]])
    values, scale = quantize_slots(x, bits)
    plain = values if bits == 8 else reference.unpack(values, 8)
    assert scale.item() == 1
    assert plain.tolist() == [[0, 2, 2, 0, -2, -2, 4, LARGEST[bits]]]


def test_packed_layout():
    values, _ = quantize_slots(torch.tensor([[7.0, -7.0, 1.0, 0.0, -1.0]]), 4)
    assert values.tolist() == [[0x97, 0x01, 0x0F]]
    assert dequantize_slots(values, torch.ones(1), dim=5).tolist() == [[7, -7, 1, 0, -1]]
    assert dequantize_slots(values, torch.ones(1)).tolist() == [[7, -7, 1, 0, -1, 0]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_within_half_a_scale(dtype, bits):
    x = random_tensor(50, 333, dtype=dtype)
    values, scale = quantize_slots(x, bits)
    back = dequantize_slots(values, scale, dim=333, dtype=torch.float64)
    # the division rounds once, in float32
    limit = scale.double() * (0.5 + LARGEST[bits] * 2**-24)
    assert ((back - x.double()).abs().amax(-1) <= limit).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_again_changes_nothing(bits):
    stored = quantize_slots(random_tensor(40, 99), bits)
    assert torch.equal(quantize_slots(dequantize_slots(*stored, dim=99), bits).values, stored.values)


def test_search_takes_quantised_slots():
    memory = random_tensor(1, 500, 96)
    values, scale = quantize_slots(memory)
    query = memory[:, 123:124] + 0.01 * random_tensor(1, 1, 96, seed=1)
    plain = similarity_topk(query, dequantize_slots(values, scale), 5)
    found = similarity_topk(query, values, 5, scale=scale)
    assert torch.equal(found.indices, plain.indices)
    assert found.indices[0, 0, 0] == 123


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout(layout, bits):
    x = random_tensor(3, 5, 70)
    stored = quantize_slots(x, bits)
    assert_same(quantize_slots(layouts(x)[layout], bits), stored)
    back = dequantize_slots(layouts(stored.values)[layout], layouts(stored.scale)[layout])
    assert torch.equal(back, dequantize_slots(*stored))


ROWS = [[4, 4, 0], [-1, 2, 5], [3, 1, 2]]  # of five; two do not exist


def chosen_rows(back: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What gathering after bringing everything back gives."""
    there = (rows >= 0) & (rows < back.shape[1])
    picked = back[torch.arange(len(rows))[:, None], rows.clamp(0, back.shape[1] - 1)]
    return torch.where(there[..., None], picked, 0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "D"), [(8, 70), (4, 70), (4, 33)])
def test_chosen_rows(bits, D, dtype, impl):
    values, scale = quantize_slots(random_tensor(3, 5, D), bits)
    everything = dequantize_slots(values, scale, dim=D, dtype=dtype)
    for rows in (torch.tensor(ROWS), torch.tensor(ROWS)[:, ::2], torch.empty(3, 0, dtype=torch.int64)):
        with poisoned():
            back = dequantize_slots(values, scale, rows=rows, dim=D, dtype=dtype, impl=impl)
        assert torch.equal(back, chosen_rows(everything, rows))
    none_held = dequantize_slots(values[:, :0], scale[:, :0], rows=torch.tensor(ROWS), dim=D, dtype=dtype, impl=impl)
    assert torch.equal(none_held, torch.zeros(3, 3, D, dtype=dtype))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_row_that_is_not_chosen_has_no_influence(impl):
    values, scale = quantize_slots(random_tensor(1, 4, 9))
    scale[0, 0] = NAN
    back = dequantize_slots(values, scale, rows=torch.tensor([[-1, 3, 1]]), impl=impl)
    assert torch.equal(back[:, 1:], dequantize_slots(values, scale)[:, [3, 1]])
    assert (back[:, 0] == 0).all()


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 80)),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-140, 130),
)
@settings(max_examples=150, deadline=None)
def test_any_row(shape, bits, dtype, exponent):
    x = (random_tensor(*shape, dtype=torch.float64, seed=sum(shape)) * 2.0**exponent).to(dtype)
    with poisoned():
        actual = quantize_slots(x, bits)
    assert_same(actual, reference.quantize_slots(x, bits))
    back = dequantize_slots(*actual, dim=shape[1], dtype=dtype)
    assert_same([back], [reference.dequantize_slots(*actual, None, shape[1], dtype)])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck(bits):
    x = random_tensor(2, 3, 21)
    torch.library.opcheck(torch.ops.vmemory.quantize_slots.default, (x, bits))
    values, scale = quantize_slots(x, bits)
    rows = torch.tensor([[2, 0, -1, 2], [1, 1, 3, 0]])
    for chosen in (None, rows):
        torch.library.opcheck(torch.ops.vmemory.dequantize_slots.default, (values, scale, chosen, 21, torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_compiles_in_one_graph(bits, backend, dynamic):
    torch._dynamo.reset()

    def step(x):
        stored = quantize_slots(x, bits)
        return *stored, dequantize_slots(*stored, dim=x.shape[-1], dtype=torch.bfloat16)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (20, 31):
        x = random_tensor(2, n, n)
        assert_same(compiled(x), step(x))


X, VALUES, SCALE = torch.ones(2, 5), torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize_slots([1.0]), TypeError, "x: expected a tensor"),
        (lambda: quantize_slots(X[0, 0]), ValueError, r"x: expected a tensor \[..., D\]"),
        (lambda: quantize_slots(X.int()), ValueError, "x: .*int32"),
        (lambda: quantize_slots(X, 2), ValueError, "bits: expected 8 or 4, got 2"),
        (lambda: dequantize_slots(None, SCALE), TypeError, "values: expected a tensor"),
        (lambda: dequantize_slots(VALUES, 1.0), TypeError, "scale: expected a tensor"),
        (lambda: dequantize_slots(X, SCALE), ValueError, "values: expected int8"),
        (lambda: dequantize_slots(VALUES, SCALE[:1]), ValueError, r"scale: expected float32 \[2\]"),
        (lambda: dequantize_slots(VALUES, SCALE.double()), ValueError, "scale: expected float32.*float64"),
        (lambda: dequantize_slots(VALUES, SCALE, dim=4), ValueError, "dim: expected 5 or 6, got 4"),
        (lambda: dequantize_slots(VALUES.char(), SCALE, dim=4), ValueError, "dim: expected 3, got 4"),
        (lambda: dequantize_slots(VALUES[None], SCALE[None], rows=1), TypeError, "rows: expected a tensor"),
        (
            lambda: dequantize_slots(VALUES, SCALE, rows=SCALE.long()[None]),
            ValueError,
            r"rows: expected int64 \[S, N\]",
        ),
        (lambda: dequantize_slots(VALUES[None], SCALE[None], rows=SCALE[None]), ValueError, "rows: .*float32"),
        (lambda: dequantize_slots(VALUES, SCALE, dtype=torch.int8), ValueError, "dtype: expected"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "dtype"), types_in_turn([*SHAPES[:4], (1, 2500), *SHAPES[6:], "odd"]))
def test_triton_matches_reference(triton, shape, dtype, bits):
    x = odd_rows(dtype) if shape == "odd" else random_tensor(*shape, dtype=dtype)
    actual = triton(MODULE, "quantize_slots", x, bits)
    assert_same(actual, reference.quantize_slots(x, bits))
    for kind in (torch.float64, torch.float32, torch.float16):
        expected = reference.dequantize_slots(*actual, None, x.shape[-1], kind)
        back = triton(MODULE, "dequantize_slots", *actual, None, x.shape[-1], kind)
        assert_within_budget(back, expected, reference.dequantize_slots(*actual, None, x.shape[-1], torch.float64))


@pytest.mark.parametrize(("bits", "D"), [(8, 70), (4, 33)])
def test_triton_of_chosen_rows(triton, bits, D):
    values, scale = quantize_slots(random_tensor(3, 5, D), bits)
    rows = torch.tensor(ROWS)
    back = triton(MODULE, "dequantize_slots", values, scale, rows, D, torch.float32)
    assert torch.equal(back, chosen_rows(dequantize_slots(values, scale, dim=D), rows))


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["quantize", "dequantize", "gather"])
def test_triton_compiles(name, bits, arch):
    from vmemory.kernels import quantize_slots as kernels

    values = {"values": "*i8" if bits == 8 else "*u8", "scales": "*fp32", "D": "i32", "STORED": "i32"}
    read = values | {"out": "*bf16", "M": "i32", "N": "i32"}
    kernel, signature, constants = {
        "quantize": (kernels._quantize_slots_kernel, values | {"x": "*bf16"}, {}),
        "dequantize": (kernels._dequantize_slots_kernel, read | {"wanted": "*fp32"}, {"WIDE": False, "GATHER": False}),
        "gather": (kernels._dequantize_slots_kernel, read | {"wanted": "*i64"}, {"WIDE": False, "GATHER": True}),
    }[name]
    compiled = compile_triton(kernel, signature, constants | {"BITS": bits, "BLOCK": 1024}, arch)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 3584), "odd"])
def test_cuda_matches_reference(shape, dtype, bits):
    x = odd_rows(dtype).cuda() if shape == "odd" else random_tensor(*shape, dtype=dtype, device="cuda")
    with poisoned():
        actual = quantize_slots(x, bits, impl="triton")
        back = dequantize_slots(*actual, dim=x.shape[-1], dtype=dtype, impl="triton")
    # on the CPU, which divides by the scale exactly as the kernel does
    assert_same([y.cpu() for y in actual], reference.quantize_slots(x.cpu(), bits))
    assert_same([back.cpu()], [reference.dequantize_slots(*(y.cpu() for y in actual), None, x.shape[-1], dtype)])


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "D"), [(8, 3584), (4, 333)])
def test_cuda_of_chosen_rows(bits, D):
    values, scale = quantize_slots(random_tensor(3, 5, D, device="cuda"), bits)
    rows = torch.tensor(ROWS, device="cuda")
    with poisoned():
        back = dequantize_slots(values, scale, rows=rows, dim=D, impl="triton")
    assert torch.equal(back.cpu(), chosen_rows(dequantize_slots(values, scale, dim=D).cpu(), rows.cpu()))
