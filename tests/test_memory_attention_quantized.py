"""Attention over slots in 8 or 4 bits is attention over what they come back as."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attention import DTYPES, SHAPES, inputs
from tests.pairwise import types_in_turn
from vmemory.ops import memory_attention, quantize_slots
from vmemory.reference import memory_attention as reference
from vmemory.reference.quantize_slots import dequantize_slots
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

MODULE = "vmemory.kernels.memory_attention"
# query, key_slots, value_slots, count, key_scale, value_scale
Stored = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def stored(shape, bits: int, dtype: torch.dtype = torch.float32) -> Stored:
    """Slots that are not valid have scales that are NaN; the half byte that an odd E leaves is not zero."""
    query, keys, values, count = inputs(*shape)
    (keys, key_scale), (values, value_scale) = quantize_slots(keys, bits), quantize_slots(values, bits)
    if bits == 4 and shape[3] % 2:
        keys[..., -1] |= 0x50
        values[..., -1] |= 0x30
    return query.to(dtype), keys, values, count, key_scale, value_scale


def outputs(impl: str, x: Stored) -> list[Tensor]:
    """The result and the gradient of the query."""
    leaf = x[0].clone().requires_grad_()
    out = memory_attention(leaf, *x[1:4], key_scale=x[4], value_scale=x[5], impl=impl)
    grad = random_tensor(*out.shape, seed=4).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad)]


def widened(x: Stored) -> Stored:
    return x[0].double(), *x[1:]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype, bits):
    x = stored(shape, bits, dtype)
    with poisoned():
        actual = outputs("native", x)
    assert_within_budget(actual, outputs("reference", x), outputs("reference", widened(x)))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_attention_over_dequantised_slots_to_the_bit(dtype, bits):
    query, keys, values, count, key_scale, value_scale = x = stored((2, 30, 2, 33, 4, 50), bits, dtype)
    plain = [dequantize_slots(k, s, None, 33, dtype) for k, s in ((keys, key_scale), (values, value_scale))]
    leaf = query.clone().requires_grad_()
    out = memory_attention(leaf, *plain, count)
    (grad,) = torch.autograd.grad(out, leaf, random_tensor(*out.shape, seed=4).to(dtype))
    for got, wanted in zip(outputs("native", x), (out, grad), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_that_was_not_finite_spoils_its_head(impl, bits):
    query, keys, values, count = inputs(1, 9, 2, 16, 3, 5)
    keys[0, 1, 2, 1, 7] = float("nan")
    (keys, key_scale), (values, value_scale) = quantize_slots(keys, bits), quantize_slots(values, bits)
    out = memory_attention(query, keys, values, count, key_scale=key_scale, value_scale=value_scale, impl=impl)
    assert out[:, :, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_gives_the_same_bits(layout):
    x = stored((2, 20, 3, 41, 4, 9), 4)
    turned = tuple(layouts(v)[layout] for v in x)
    for got, wanted in zip(outputs("native", turned), outputs("native", x), strict=True):
        assert torch.equal(got, wanted)


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 3), st.integers(1, 40)),
    # over one key alone the gradient of the query is 0, and so is the budget for what two orders of sums leave of it
    memory=st.tuples(st.integers(0, 4), st.integers(0, 60).filter(lambda n: n != 1)),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(sizes, memory, bits, dtype):
    x = stored((*sizes, *memory), bits, dtype)
    with poisoned():
        actual = outputs("auto", x)
    assert_within_budget(actual, outputs("reference", x), outputs("reference", widened(x)))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck_gradcheck_and_one_graph(bits):
    x = stored((2, 5, 2, 7, 3, 4), bits, torch.float64)
    torch.library.opcheck(torch.ops.vmemory.memory_attention.default, (*x, True))
    out, stats = torch.ops.vmemory.memory_attention(*x, True)
    torch.library.opcheck(
        torch.ops.vmemory.memory_attention_backward.default, (torch.ones_like(out), *x, out, stats, False)
    )
    scales = {"key_scale": x[4], "value_scale": x[5]}
    leaf = x[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: memory_attention(q, *x[1:4], **scales), leaf)
    torch._dynamo.reset()
    compiled = torch.compile(memory_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*x[:4], **scales), memory_attention(*x[:4], **scales))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_scale": None}, "key_scale: expected one with int8 or uint8 slots"),
        ({"value_scale": None}, "value_scale: expected one with int8 or uint8 slots"),
        ({"value_scale": torch.ones(1)}, r"value_scale: expected a tensor \[S, M, n, G\]"),
        ({"key_scale": torch.ones(2, 3, 4, 1)}, r"key_scale: expected float32 of shape \[2, 3, 4, 2\]"),
        ({"key_scale": torch.ones(2, 3, 4, 2).half()}, "key_scale: expected float32 .*float16"),
        ({"value_slots": torch.ones(2, 3, 4, 2, 4).char()}, "value_slots: expected key_slots's dtype"),
        ({"query": torch.ones(2, 5, 2, 10)}, r"key_slots: expected \[2, M, n, 2, 5\]"),
        ({"key_slots": torch.ones(2, 3, 4, 2, 7), "value_slots": torch.ones(2, 3, 4, 2, 7)}, "key_scale: expected one"),
    ],
)
def test_bad_arguments(changes, words):
    names = "query", "key_slots", "value_slots", "count", "key_scale", "value_scale"
    x = dict(zip(names, stored((2, 5, 2, 7, 3, 4), 4), strict=True))
    with pytest.raises(ValueError, match=words):
        memory_attention(**(x | changes))


# one block and many, keys split between programs and not
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("shape", "dtype"), types_in_turn([SHAPES[0], SHAPES[2], (2, 5, 2, 9, 2, 3), SHAPES[6], (1, 60, 1, 40, 2, 150)])
)
def test_triton_matches_reference(triton, shape, dtype, bits):
    x = stored(shape, bits, dtype)
    out, stats = triton(MODULE, "memory_attention", *x, True)
    grad = random_tensor(*out.shape, seed=4).to(dtype)
    to_query, *others = triton(MODULE, "memory_attention_backward", grad, *x, out, stats, False)
    assert_within_budget([out.to(dtype), to_query], outputs("reference", x), outputs("reference", widened(x)))
    assert [y.shape for y in others] == [(0,), (0,)]


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["fwd", "query_bwd"])
@pytest.mark.parametrize("slots", ["i8", "u8"])
@pytest.mark.parametrize(("dtype", "channels"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64)])
def test_triton_compiles(kernel, slots, dtype, channels, arch):
    aligned = ("keys", "values", "query") if (kernel, dtype) == ("fwd", "fp32") else ()
    compiled = compiled_for(kernel, slots, dtype, channels, arch, aligned)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_triton_compiles_for_float32_beside_aligned_slots(channels, arch):
    """Slots as launches find them are loaded 16 bytes at a time, which takes four times the registers in float32."""
    for slots in ("i8", "u8"):
        assert compiled_for("fwd", slots, "fp32", channels, arch, ("keys", "values", "query")).spills == 0, slots


def compiled_for(kernel, slots, dtype, channels, arch, aligned=()):
    from vmemory.kernels import memory_attention as kernels

    signature = dict.fromkeys(("N", "M", "ROWS", "S", "G", "SPLITS"), "i32") | {"count": "*i64", "SCALE": "fp32"}
    signature |= dict.fromkeys(("query", "grad", "out", "to_query"), f"*{dtype}")
    signature |= dict.fromkeys(("keys", "values"), f"*{slots}")
    signature |= dict.fromkeys(("stats", "delta", "key_scale", "value_scale"), "*fp32")
    config = kernels.blocks(channels, dtype == "fp32", "BLOCK_M" if kernel == "query_bwd" else "", True)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"E": channels, "QUANTIZED": True, **config} | ({"WHOLE": True} if kernel == "fwd" else {})
    function = getattr(kernels, f"_memory_attention_{kernel}_kernel")
    return compile_triton(function, signature, constants, arch, aligned, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 196, 7, 128, 40, 196)])
def test_cuda_matches_reference(shape, dtype, bits):
    x = tuple(v.cuda() for v in stored(shape, bits, dtype))
    with poisoned():
        actual = outputs("triton", x)
    assert_within_budget(actual, outputs("reference", x), outputs("reference", widened(x)))


def test_reference_dequantises():
    query, keys, values, count, key_scale, value_scale = x = stored(SHAPES[0], 4)
    plain = [dequantize_slots(k, s, None, query.shape[-1]) for k, s in ((keys, key_scale), (values, value_scale))]
    assert torch.equal(reference.memory_attention(*x), reference.memory_attention(query, *plain, count))
