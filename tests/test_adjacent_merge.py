from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pairwise import types_in_turn
from vmemory.ops import adjacent_merge, adjacent_similarity
from vmemory.reference import adjacent_merge as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEVELS = ("frame", "token")
MODULE = "vmemory.kernels.adjacent_merge"
SHAPES = [(2, 5, 9, 33), (1, 6, 63, 1000), (1, 300, 2, 16), (3, 2, 1, 7), (0, 3, 2, 4), (2, 3, 4, 0), (1, 40, 1, 1)]
NAN = float("nan")


def sizes_of(bank: Tensor, seed: int = 0) -> Tensor:
    """Whole numbers from 0 to 4, in the dtype a bank's sizes have."""
    wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
    size = torch.randint(0, 5, bank.shape[:3], generator=torch.Generator().manual_seed(seed))
    return size.to(bank.device, wide)


def gradient(impl: str, bank: Tensor, size: Tensor, level: str) -> Tensor:
    bank = bank.clone().requires_grad_()
    out = adjacent_merge(bank, size, level, impl=impl).bank
    return torch.autograd.grad(out, bank, random_tensor(*out.shape, seed=3).to(out.device, out.dtype))[0]


def assert_merges_as_reference(actual, bank: Tensor, size: Tensor, level: str) -> None:
    """The reference's place wherever its margin exceeds rounding; there its numbers within the budget."""
    low = reference.adjacent_merge(bank, size, level)
    wide = reference.adjacent_merge(bank.double(), size.double(), level)
    if not torch.equal(actual[2], wide[2]):
        similarity = reference.adjacent_similarity(bank.double(), level).reshape(*bank.shape[:1], bank.shape[1] - 1, -1)
        gap = similarity.gather(1, wide[2][:, None]) - similarity.gather(1, actual[2][:, None])
        assert gap.max() < 1e-6, f"places {actual[2].tolist()}, expected {wide[2].tolist()}"
        return
    assert torch.equal(actual[1].double(), wide[1])
    if torch.equal(low[2], wide[2]):
        assert_within_budget(actual[0], low[0], wide[0])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_reference(shape, dtype, level):
    bank = random_tensor(*shape, dtype=dtype)
    size = sizes_of(bank)
    with poisoned():
        actual, grad = adjacent_merge(bank, size, level), gradient("native", bank, size, level)
    assert_merges_as_reference(actual, bank, size, level)
    wide = gradient("reference", bank.double(), size.double(), level)
    assert_within_budget(grad, gradient("reference", bank, size, level), wide)


@pytest.mark.parametrize("level", LEVELS)
def test_the_pair_is_that_of_the_largest_adjacent_similarity(level):
    bank = random_tensor(3, 40, 5, 70)
    similarity = adjacent_similarity(bank, level).reshape(3, 39, -1)
    assert torch.equal(adjacent_merge(bank, sizes_of(bank), level).place, similarity.argmax(1))


@pytest.mark.parametrize("level", LEVELS)
def test_merging_keeps_the_weighted_sum_and_the_order(level):
    bank, size = random_tensor(2, 12, 4, 8, dtype=torch.float64), torch.ones(2, 12, 4, dtype=torch.float64)
    total = (bank * size[..., None]).sum(1)
    for entries in range(11, 0, -1):
        bank, size, _ = adjacent_merge(bank, size, level)
        assert bank.shape[1] == entries
    assert (size == 12).all()
    torch.testing.assert_close(bank[:, 0] * 12, total)


def test_token_level_is_the_compression_of_ma_lmm():
    """Against the published rule: the later token's content is added to the earlier one's, sizes decide the weights."""
    bank, size = random_tensor(1, 6, 5, 16), sizes_of(random_tensor(1, 6, 5, 16)) + 1
    merged = adjacent_merge(bank, size, "token")
    for n in range(5):
        rows, counts = list(bank[0, :, n]), size[0, :, n].tolist()
        cosine = torch.nn.functional.cosine_similarity(bank[0, 1:, n], bank[0, :-1, n], dim=-1)
        at = int(cosine.argmax())
        rows[at] = (rows[at] * counts[at] + rows[at + 1] * counts[at + 1]) / (counts[at] + counts[at + 1])
        counts[at] += counts[at + 1]
        del rows[at + 1], counts[at + 1]
        torch.testing.assert_close(merged.bank[0, :, n], torch.stack(rows))
        assert merged.size[0, :, n].tolist() == counts


@pytest.mark.parametrize("level", LEVELS)
def test_the_first_of_equal_pairs_is_merged(level):
    frame = random_tensor(1, 1, 3, 1153)
    bank = torch.cat([random_tensor(1, 2, 3, 1153, seed=4), frame.expand(-1, 5, -1, -1)], 1)
    assert (adjacent_merge(bank, torch.ones(1, 7, 3), level).place == 2).all()


@pytest.mark.parametrize("level", LEVELS)
def test_nan_is_merged_first(level):
    bank = random_tensor(1, 6, 2, 40)
    bank[0, 0] = bank[0, 1]
    bank[0, 3, 1, 7] = NAN
    merged = adjacent_merge(bank, torch.ones(1, 6, 2), level)
    assert merged.place.tolist() == ([[2]] if level == "frame" else [[0, 2]])
    assert merged.bank[0, 2, 1].isnan().nonzero().tolist() == [[7]]
    assert not merged.bank[0, 3:].isnan().any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("level", LEVELS)
def test_entries_without_size_count_alike(level, impl):
    bank = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    merged = adjacent_merge(bank, torch.zeros(1, 2, 1), level, impl=impl)
    assert merged.bank.item() == 2
    assert merged.size.item() == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_gives_the_same_bits(layout, level):
    bank = random_tensor(2, 4, 5, 70)
    size = sizes_of(bank)
    turned = adjacent_merge(layouts(bank)[layout], layouts(size)[layout], level)
    for actual, expected in zip(turned, adjacent_merge(bank, size, level), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(level):
    bank = random_tensor(2, 4, 3, 5, dtype=torch.float64).requires_grad_()
    size = sizes_of(bank)
    assert torch.autograd.gradcheck(lambda x: adjacent_merge(x, size, level).bank, bank)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("level", LEVELS)
def test_opcheck(level):
    bank = random_tensor(2, 4, 3, 20)
    size = sizes_of(bank)
    torch.library.opcheck(torch.ops.vmemory.adjacent_merge.default, (bank, size, level))
    merged = adjacent_merge(bank, size, level)
    torch.library.opcheck(torch.ops.vmemory.adjacent_merge_backward.default, (merged.bank, size, merged.place))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic, level):
    torch._dynamo.reset()
    compiled = torch.compile(adjacent_merge, fullgraph=True, backend=backend, dynamic=dynamic)
    for entries in (4, 6):
        bank = random_tensor(2, entries, 4, 20)
        size = sizes_of(bank)
        for actual, expected in zip(compiled(bank, size, level), adjacent_merge(bank, size, level), strict=True):
            assert torch.equal(actual, expected)
        variables = [bank.clone().requires_grad_() for _ in range(2)]
        for function, x in zip((compiled, adjacent_merge), variables, strict=True):
            function(x, size, level).bank.square().sum().backward()
        assert torch.equal(variables[0].grad, variables[1].grad)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(2, 7), st.integers(1, 9), st.integers(0, 40)),
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, level, dtype, layout, ties):
    bank = random_tensor(*shape, dtype=dtype, seed=sum(shape))
    if ties:
        bank = bank[:, :1].expand(shape).contiguous()
    size = sizes_of(bank)
    with poisoned():
        actual = adjacent_merge(layouts(bank)[layout], size, level)
    if ties:
        assert (actual.place == 0).all()
        low, wide = reference.adjacent_merge(bank, size, level), reference.adjacent_merge(bank.double(), size, level)
        assert_within_budget(actual.bank, low[0], wide[0])
    else:
        assert_merges_as_reference(actual, bank, size, level)


BANK, SIZE = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: adjacent_merge(3, SIZE), TypeError, "bank: expected a tensor"),
        (lambda: adjacent_merge(BANK[0], SIZE), ValueError, r"bank: expected a tensor \[S, T, N, D\]"),
        (lambda: adjacent_merge(BANK[:, :1], SIZE), ValueError, r"bank: expected at least 2 entries.*\[1, 1, 2, 4\]"),
        (lambda: adjacent_merge(BANK[:, :, :0], SIZE), ValueError, "bank: expected at least 1 token"),
        (lambda: adjacent_merge(BANK.int(), SIZE), ValueError, "bank: .*int32"),
        (lambda: adjacent_merge(BANK, None), TypeError, "size: expected a tensor"),
        (lambda: adjacent_merge(BANK, SIZE[:, :2]), ValueError, r"size: expected \[1, 3, 2\], got shape \[1, 2, 2\]"),
        (lambda: adjacent_merge(BANK, SIZE.long()), ValueError, "size: expected torch.float32, got torch.int64"),
        (lambda: adjacent_merge(BANK, SIZE, "patch"), ValueError, "level: expected one of"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("shape", "dtype"), types_in_turn([(2, 3, 2, 33), (1, 20, 1, 4), (3, 2, 3, 5), (0, 3, 2, 4), (1, 3, 2, 0)])
)
def test_triton_matches_reference(triton, shape, dtype, level):
    bank = random_tensor(*shape, dtype=dtype)
    size = sizes_of(bank)
    merged = triton(MODULE, "adjacent_merge", bank, size, level)
    assert_merges_as_reference(merged, bank, size, level)
    grad, grads = random_tensor(*merged[0].shape, dtype=dtype, seed=4), []
    for x in (bank.clone().requires_grad_(), bank.double().requires_grad_()):
        out = reference.adjacent_merge(x, size, level)[0]
        grads += torch.autograd.grad(out, x, grad.to(out.dtype))
    assert_within_budget(triton(MODULE, "adjacent_merge_backward", grad, size, merged[2]), *grads)


@pytest.mark.parametrize("level", LEVELS)
def test_triton_chooses_nan_and_the_first_of_equals(triton, level):
    # more pairs than one block of the search holds
    bank = random_tensor(1, 1, 2, 3).repeat(1, 300, 1, 1)
    size = torch.ones(1, 300, 2)
    bank[0, 270, 1, 2] = NAN
    place = triton(MODULE, "adjacent_merge", bank, size, level)[2]
    assert place.tolist() == ([[269]] if level == "frame" else [[0, 269]])


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["choice", "fwd", "bwd"])
def test_triton_compiles(name, whole, arch):
    from vmemory.kernels import adjacent_merge as kernels

    move = {"x": "*bf16", "grad": "*bf16", "size": "*fp32", "place": "*i64", "out": "*bf16", "sizes": "*fp32"}
    move |= {"T": "i32", "N": "i32", "D": "i32"}
    choice = {"similarity": "*fp32", "place": "*i64", "PAIRS": "i32", "n": "i32"}
    tile = {"WHOLE": whole, "BLOCK_D": 1024}
    kernel, signature, constants = {
        "choice": (kernels._first_largest_kernel, choice, {"BLOCK": 256}),
        "fwd": (kernels._adjacent_merge_fwd_kernel, move, tile),
        "bwd": (kernels._adjacent_merge_bwd_kernel, move, tile),
    }[name]
    compiled = compile_triton(kernel, signature, constants, arch)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 2, 9000)])
def test_cuda_matches_reference(shape, dtype, level):
    bank = random_tensor(*shape, dtype=dtype, device="cuda")
    size = sizes_of(bank)
    with poisoned():
        actual, grad = adjacent_merge(bank, size, level, impl="triton"), gradient("triton", bank, size, level)
    assert_merges_as_reference(actual, bank, size, level)
    wide = gradient("reference", bank.double(), size.double(), level)
    assert_within_budget(grad, gradient("reference", bank, size, level), wide)
