from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fusion import ACTIVATIONS, DTYPES, NAMES, SHAPES, gradients, inputs, term_by_term, wide
from vmemory.ops import gated_fusion
from vmemory.reference import gated_fusion as reference
from vmemory.testing import assert_within_budget, layouts, poisoned


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype, activation):
    x = inputs(*shape, dtype)
    with poisoned():
        actual, grads = gated_fusion(*x, activation), gradients("native", x, activation)
    low, exact = reference.gated_fusion(*x, activation), reference.gated_fusion(*wide(x), activation)
    assert_within_budget(actual, low, exact)
    low, exact = gradients("reference", x, activation), gradients("reference", wide(x), activation)
    assert_within_budget(grads, low, exact)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("working", "w2"), ("w1", "b2")])
def test_gradients_asked_for_alone(wanted):
    x = inputs(50, 40, 24)
    together = dict(zip(NAMES, gradients("native", x, "relu"), strict=True))
    for name, grad in zip(wanted, gradients("native", x, "relu", wanted), strict=True):
        assert torch.equal(grad, together[name])


@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_gives_the_same_bits(layout):
    x = inputs(20, 70, 33)
    assert torch.equal(gated_fusion(*(layouts(t)[layout] for t in x)), gated_fusion(*x))


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0, 3), (4, 1)])
def test_leading_dimensions(lead):
    x = inputs(24, 10, 6)
    n = torch.Size(lead).numel()
    a, b = (t[:n].reshape(*lead, 10).requires_grad_() for t in x[:2])
    out = gated_fusion(a, b, *x[2:])
    assert out.shape == (*lead, 10)
    assert torch.equal(out.reshape(n, 10), gated_fusion(x[0][:n], x[1][:n], *x[2:]))
    assert torch.autograd.grad(out.sum(), a)[0].shape == a.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay_in_their_token(activation, dtype):
    x = inputs(40, 32, 16, dtype)
    x[0][3, 5], x[1][20, 0] = float("nan"), float("inf")
    out = gated_fusion(*x, activation)
    rows = torch.isfinite(out).all(1)
    assert not rows[3]
    assert not rows[20]
    assert rows.sum() == 38
    assert_within_budget(out, reference.gated_fusion(*x, activation), reference.gated_fusion(*wide(x), activation))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_alike(dtype):
    x = inputs(300, 128, 64, dtype)
    assert all(torch.equal(gated_fusion(*x), gated_fusion(*x)) for _ in range(3))
    for first, second in zip(gradients("native", x, "gelu"), gradients("native", x, "gelu"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("native")
def test_thread_count_does_not_change_the_result():
    x, threads = inputs(333, 96, 50), torch.get_num_threads()
    outs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append([gated_fusion(*x), *gradients("native", x, "silu")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for out in outs[1:] for a, b in zip(outs[0], out, strict=True))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x = [t.requires_grad_() for t in inputs(5, 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: gated_fusion(*x, activation), x)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x = inputs(5, 6, 4, dtype)
    for save in (False, True):
        torch.library.opcheck(torch.ops.vmemory.gated_fusion.default, (*x, "silu", save))
    hidden = torch.ops.vmemory.gated_fusion(*x, "silu", True)[1]
    arguments = torch.ones_like(x[0]), x[0], x[1], x[2], x[4], x[5], hidden, "silu"
    for wanted in ((True,) * 6, (True, False, False, True, False, False)):
        torch.library.opcheck(torch.ops.vmemory.gated_fusion_backward.default, (*arguments, *wanted))


def test_second_derivatives_are_refused():
    x = [t.requires_grad_() for t in inputs(5, 3, 4)]
    (grad,) = torch.autograd.grad(gated_fusion(*x).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(gated_fusion, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (3, 50):
        x = [t.requires_grad_() for t in inputs(n, 20, 12)]
        x[0] = x[0].detach().unflatten(0, (1, n)).requires_grad_()
        x[1] = x[1].detach().unflatten(0, (1, n)).requires_grad_()
        actual, expected = compiled(*x, "gelu"), gated_fusion(*x, "gelu")
        assert torch.equal(actual, expected)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (actual, expected)), strict=True):
            assert torch.equal(a, b)


@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(0, 40)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, dtype, activation, layout):
    x = [layouts(t)[layout] for t in inputs(*shape, dtype)]
    with poisoned():
        actual = gated_fusion(*x, activation)
    low, exact = reference.gated_fusion(*x, activation), reference.gated_fusion(*wide(x), activation)
    if dtype == torch.float32:
        # on so few numbers the rounding of one order of summation says little about that of another
        rows = [low, term_by_term(x, activation), term_by_term(x, activation, backwards=True)]
        low = max(rows, key=lambda y: (y - exact).abs().amax() if y.numel() else 0)
    assert_within_budget(actual, low, exact)


def swapped(place: int, value: object) -> list:
    x: list = inputs(4, 6, 5)
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (swapped(0, 3), TypeError, r"working: expected a tensor \[..., D\], got int"),
        (swapped(0, torch.ones(())), ValueError, "working: expected a tensor"),
        (swapped(0, torch.ones(4, 6, dtype=torch.int64)), ValueError, "working: .*int64"),
        (swapped(1, torch.ones(4, 7)), ValueError, r"episodic: expected \[..., D\] = \[4, 6\], got shape \[4, 7\]"),
        (swapped(1, torch.ones(4, 6).double()), ValueError, "episodic: expected working's dtype"),
        (swapped(2, torch.ones(5, 6)), ValueError, r"w1: expected \[Hd, 2D\] = \[5, 12\]"),
        (swapped(3, None), TypeError, "b1: expected a tensor"),
        (swapped(3, torch.ones(4)), ValueError, r"b1: expected \[Hd\] = \[5\]"),
        (swapped(4, torch.ones(5, 6)), ValueError, r"w2: expected \[D, Hd\] = \[6, 5\]"),
        (swapped(5, torch.ones(6, device="meta")), ValueError, "b2: expected working's device"),
        ([*inputs(4, 6, 5), "tanh"], ValueError, "activation: expected one of 'relu', 'gelu', 'silu', got 'tanh'"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        gated_fusion(*arguments)
