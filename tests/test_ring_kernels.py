"""The kernels of rings and slots for CUDA devices: on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.pairwise import types_in_turn
from tests.rings import DTYPES, NAN, SHAPES, VARIANTS, assert_same, copies, empty, push_both, replace_both
from vmemory.ops import ring_push_, ring_read, slot_replace_
from vmemory.reference import ring as reference
from vmemory.testing import A100_SHARED_BYTES, compile_triton, random_tensor

MODULE = "vmemory.kernels.ring"


@pytest.mark.parametrize(
    ("shape", "frames", "dtype"),
    [(*case, dtype) for case, dtype in types_in_turn([shape for shape in SHAPES if shape[0][3] < 1000])],
)
def test_triton_push(triton, shape, frames, dtype):
    def push(slots, count, x, streams):
        triton(MODULE, "ring_push_", slots, count, x, streams)

    push_both(push, 4, shape, frames, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"), types_in_turn([(2, 5, 3, 7), (2, 0, 3, 4), (2, 3, 0, 4), (0, 3, 4, 5), (1, 2, 30, 300)])
)
def test_triton_read(triton, shape, dtype):
    slots, count = empty(*shape, dtype=dtype)
    ring_push_(slots, count, random_tensor(shape[0], 4, *shape[2:], dtype=dtype))
    for a, b in zip(triton(MODULE, "ring_read", slots, count), reference.ring_read(slots, count), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("shape", "dtype"), types_in_turn([(2, 3, 5, 7), (2, 0, 3, 4), (1, 3, 25, 700), (1, 20, 3, 9)])
)
def test_triton_replace(triton, shape, dtype, variant):
    def replace(slots, count, frames, streams, level, means):
        return triton(MODULE, "slot_replace_", slots, count, means, frames, streams, level)

    replace_both(replace, shape[1] + 3, shape, variant, dtype)


@pytest.mark.parametrize("level", ["flat", "mean"])
def test_triton_replaces_the_first_of_equals_and_nan_first(triton, level):
    frame = random_tensor(1, 3, 300)
    slots, count = frame.expand(70, -1, -1)[None].clone(), torch.tensor([70])
    slots[0, :66] *= -1
    assert triton(MODULE, "slot_replace_", slots, count, None, frame, None, level).item() == 66
    slots[0, 68, 2, 299] = NAN
    assert triton(MODULE, "slot_replace_", slots, count, None, frame, None, level).item() == 68


@pytest.mark.usefixtures("triton_compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["push", "advance", "read", "mean", "products", "replace", "replace-means"])
def test_triton_compiles(name, arch):
    from vmemory.kernels import ring as kernels

    storage = dict.fromkeys(("slots", "frames", "out", "own"), "*bf16")
    counters = dict.fromkeys(("count", "streams", "held", "written", "replaced"), "*i64")
    sums = dict.fromkeys(("mean", "means", "part"), "*fp32")
    sizes = dict.fromkeys(("S", "M", "N", "D", "T", "LAST", "size", "EACH", "CHUNKS"), "i32")
    steps = dict.fromkeys(("OWN_STEP", "OWN_FIRST", "MEAN_STEP", "MEAN_FIRST"), "i32")
    signature = storage | counters | sums | sizes | steps
    replace = {"BLOCK": 2048, "BLOCK_M": 64, "BLOCK_C": 16, "BLOCK_D": 1024}
    kernel, constants = {
        "push": (kernels._ring_push_kernel, {"BLOCK": 2048}),
        "advance": (kernels._ring_advance_kernel, {}),
        "read": (kernels._ring_read_kernel, {"BLOCK": 2048}),
        "mean": (kernels._slot_mean_kernel, {"BLOCK_N": 16, "BLOCK_D": 128}),
        "products": (kernels._slot_products_kernel, {"BY_STREAM": True, "CHUNK": 8192, "BLOCK": 2048}),
        "replace": (kernels._slot_replace_kernel, replace | {"KEEPS_MEANS": False}),
        "replace-means": (kernels._slot_replace_kernel, replace | {"KEEPS_MEANS": True}),
    }[name]
    routed = {} if name == "read" else {"ROUTED": True}
    compiled = compile_triton(kernel, signature, constants | routed, arch)
    assert compiled.spills == 0
    assert compiled.shared < A100_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("shape", "frames"), [*SHAPES, ((64, 3, 196, 896), 1)])
def test_cuda_push_and_read(shape, frames, dtype, impl):
    def push(slots, count, x, streams):
        ring_push_(slots, count, x, streams, impl=impl)

    push_both(push, 3 * shape[1] + 1, shape, frames, dtype, "cuda")
    slots, count = empty(*shape, dtype=dtype, device="cuda")
    push(slots, count, random_tensor(shape[0], frames, *shape[2:], dtype=dtype, device="cuda"), None)
    for a, b in zip(ring_read(slots, count, impl="triton"), reference.ring_read(slots, count), strict=True):
        assert_same(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 63, 1000), (2, 0, 3, 4), (3, 32, 196, 896)])
def test_cuda_replace(shape, dtype, variant, impl):
    def replace(slots, count, frames, streams, level, means):
        return slot_replace_(slots, count, frames, streams, level=level, means=means, impl=impl)

    replace_both(replace, 2 * shape[1] + 2, shape, variant, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_cuda_graph_replays_count_on_the_device(impl):
    ring, slots = (empty(2, 3, 4, 8, device="cuda") for _ in range(2))
    x = torch.zeros(2, 4, 8, device="cuda")
    expected = copies(*ring, *slots)

    def step(ring, count, slots, written):
        ring_push_(ring, count, x[:, None], impl=impl)
        return slot_replace_(slots, written, x, impl=impl)

    warm = copies(*ring, *slots)
    step(*warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replaced = step(*ring, *slots)
    for i in range(10):
        x.copy_(random_tensor(2, 4, 8, seed=i))
        graph.replay()
        reference.ring_push_(expected[0], expected[1], x[:, None])
        assert torch.equal(replaced, reference.slot_replace_(expected[2], expected[3], x))
        for a, b in zip((*ring, *slots), expected, strict=True):
            assert_same(a, b)
