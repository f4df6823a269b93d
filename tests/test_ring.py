from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmemory.ops import ring_push_, ring_read, slot_replace_
from vmemory.reference import ring as reference
from vmemory.testing import A100_SHARED_BYTES, assert_within_budget, compile_triton, layouts, poisoned, random_tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODULE = "vmemory.kernels.ring"
NAN = float("nan")
VARIANTS = ["flat", "mean", "mean, kept"]


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A memory without frames: slots full of NaN, so that a read of what was never written shows."""
    return torch.full(shape, NAN, dtype=dtype, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device)


def means_for(slots: Tensor, variant: str) -> Tensor | None:
    if variant != "mean, kept":
        return None
    wide = torch.float64 if slots.dtype == torch.float64 else torch.float32
    return torch.full((*slots.shape[:2], slots.shape[3]), NAN, dtype=wide, device=slots.device)


def copies(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.clone() for x in tensors]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def push_both(push, steps: int, shape: tuple[int, ...], frames: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Pushes until the ring has wrapped three times; kernel and reference hold the same after each."""
    slots, count = empty(*shape, dtype=dtype, device=device)
    expected = copies(slots, count)
    streams = torch.tensor([shape[0] - 1, -1, shape[0], 0], device=device)
    for step in range(steps):
        routed = shape[0] > 1 and step % 2 == 1
        rows = len(streams) if routed else shape[0]
        x = random_tensor(rows, frames, *shape[2:], dtype=dtype, seed=step, device=device)
        push(slots, count, x, streams if routed else None)
        reference.ring_push_(*expected, x, streams if routed else None)
        assert_same(slots, expected[0])
        assert_same(count, expected[1])


SHAPES = [
    ((2, 3, 5, 7), 1),
    ((1, 4, 63, 1000), 3),
    ((3, 4, 2, 9), 11),
    ((2, 1, 3, 4), 2),
    ((2, 0, 3, 4), 2),
    ((2, 3, 0, 4), 1),
    ((2, 3, 4, 5), 0),
    ((0, 3, 4, 5), 2),
]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "frames"), SHAPES)
def test_native_push_matches_reference(shape, frames, dtype):
    push_both(ring_push_, 3 * shape[1] + 1, shape, frames, dtype)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pushed", [0, 1, 4, 5, 23])
def test_native_read_matches_reference(pushed, dtype):
    slots, count = empty(2, 5, 3, 7, dtype=dtype)
    x = random_tensor(2, pushed, 3, 7, dtype=dtype)
    ring_push_(slots, count, x)
    count[1] = 2
    with poisoned():
        actual = ring_read(slots, count)
    for a, b in zip(actual, reference.ring_read(slots, count), strict=True):
        assert_same(a, b)
    held = min(pushed, 5)
    assert_same(actual.frames[0, :held], x[0, pushed - held :])
    assert (actual.frames[0, held:] == 0).all()


def test_reading_an_empty_shape():
    for shape in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)):
        frames, count = ring_read(*empty(*shape))
        assert frames.shape == shape
        assert count.tolist() == [0] * shape[0]


@pytest.mark.parametrize("layout", ["offset", "strided", "reversed", "padded"])
def test_any_layout_of_frames_and_slots_read(layout):
    x = random_tensor(2, 3, 4, 6)
    slots, count = empty(2, 5, 4, 6)
    ring_push_(slots, count, layouts(x)[layout])
    assert_same(slots[:, :3], x)
    assert_same(ring_read(layouts(slots)[layout], layouts(count)["strided"]).frames, ring_read(slots, count).frames)


def replace_both(replace, steps: int, shape: tuple[int, ...], variant: str, dtype: torch.dtype, device: str = "cpu"):
    """One frame after the other; wherever the reference's margin exceeds rounding the same slot is replaced."""
    slots, count = empty(*shape, dtype=dtype, device=device)
    level, means, places = variant.split(",")[0], means_for(slots, variant), []
    streams = torch.tensor([shape[0] - 1, -1, shape[0], 0], device=device)
    for step in range(steps):
        routed = shape[0] > 1 and step % 2 == 1
        rows = len(streams) if routed else shape[0]
        x = random_tensor(rows, *shape[2:], dtype=dtype, seed=step, device=device)
        state = copies(slots, count, means)
        route = streams if routed else None
        actual = replace(slots, count, x, route, level, means)
        expected = reference.slot_replace_(state[0], state[1], x, route, level, state[2])
        assert torch.equal(actual, expected)
        assert_same(slots, state[0])
        assert_same(count, state[1])
        if means is not None:
            assert_within_budget(means.nan_to_num(), state[2].nan_to_num(), reference_means(slots, count))
            means.copy_(state[2])
        places += actual.tolist()
    return places


def reference_means(slots: Tensor, count: Tensor) -> Tensor:
    written = torch.arange(slots.shape[1], device=slots.device) < count[:, None]
    return torch.where(written[..., None], slots.double().mean(2), 0)


def replace_native(slots, count, frames, streams, level, means):
    return slot_replace_(slots, count, frames, streams, level=level, means=means)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 63, 1000), (3, 1, 2, 9), (2, 0, 3, 4), (1, 9, 300, 70)])
def test_native_replace_matches_reference(shape, dtype, variant):
    places = replace_both(replace_native, 4 * shape[1] + 2, shape, variant, dtype)
    assert (max(places) >= 0) == (shape[1] > 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_most_similar_slot_is_replaced(variant):
    level = variant.split(",")[0]
    frames = random_tensor(1, 6, 9, 40)
    slots, count = empty(1, 6, 9, 40)
    means = means_for(slots, variant)
    for t in range(6):
        assert slot_replace_(slots, count, frames[:, t], level=level, means=means).tolist() == [-1]
    assert_same(slots, frames)
    near = frames[:, 4] * 3 + random_tensor(1, 9, 40, seed=9) * 0.01
    assert slot_replace_(slots, count, near, level=level, means=means).tolist() == [4]
    assert_same(slots[:, 4], near)
    assert count.tolist() == [7]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_of_equal_slots_and_a_nan_slot_go_first(variant):
    level = variant.split(",")[0]
    frame = random_tensor(1, 63, 333)
    slots, count = empty(1, 5, 63, 333)
    means = means_for(slots, variant)
    for x in (-frame, frame, frame, frame, frame):
        slot_replace_(slots, count, x, level=level, means=means)
    assert slot_replace_(slots, count, frame, level=level, means=means).item() == 1
    slots[0, 3, 62, 332] = NAN
    if means is not None:
        means[0, 3, 332] = NAN
    assert slot_replace_(slots, count, frame, level=level, means=means).item() == 3
    assert not slots.isnan().any()
    assert slot_replace_(slots, count, frame * NAN, level=level, means=means).item() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_frames_are_similar_to_nothing(variant):
    level = variant.split(",")[0]
    slots, count = empty(1, 3, 2, 8)
    means = means_for(slots, variant)
    for scale in (-1.0, 0.0, 0.0):
        slot_replace_(slots, count, torch.full((1, 2, 8), scale), level=level, means=means)
    assert slot_replace_(slots, count, torch.ones(1, 2, 8), level=level, means=means).item() == 1


def test_threads_do_not_show():
    frames, threads = random_tensor(40, 1, 196, 96), torch.get_num_threads()
    states = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            slots, count = empty(1, 8, 196, 96)
            states.append([slot_replace_(slots, count, x).item() for x in frames])
    finally:
        torch.set_num_threads(threads)
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("level", ["flat", "mean"])
def test_a_frame_with_a_gradient_is_stored_without_it(level):
    slots, count = empty(1, 2, 3, 4)
    x = random_tensor(1, 3, 4).requires_grad_()
    slot_replace_(slots, count, x, level=level)
    ring_push_(slots, count, x[:, None])
    assert not slots.requires_grad
    assert_same(slots[0, 0], x[0].detach())


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5), st.integers(0, 20)),
    frames=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "strided", "reversed", "padded"]),
)
@settings(max_examples=60, deadline=None)
def test_any_push(shape, frames, dtype, layout):
    slots, count = empty(*shape, dtype=dtype)
    expected = copies(slots, count)
    for seed, steps in enumerate(frames):
        x = random_tensor(shape[0], steps, *shape[2:], dtype=dtype, seed=seed)
        ring_push_(slots, count, layouts(x)[layout])
        reference.ring_push_(*expected, x)
    assert_same(slots, expected[0])
    with poisoned():
        actual = ring_read(slots, count)
    for a, b in zip(actual, reference.ring_read(*expected), strict=True):
        assert_same(a, b)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(1, 5), st.integers(20, 40)),
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_any_replacement(shape, variant, dtype):
    replace_both(replace_native, 2 * shape[1] + 3, shape, variant, dtype)


@pytest.mark.usefixtures("native")
def test_opcheck():
    ops = torch.ops.vmemory
    slots, count = torch.zeros(2, 3, 4, 5), torch.tensor([1, 7])
    streams = torch.tensor([1, 0])
    torch.library.opcheck(ops.ring_push_.default, (slots, count, random_tensor(2, 2, 4, 5), streams))
    torch.library.opcheck(ops.ring_read.default, (slots, count))
    frame = random_tensor(2, 4, 5)
    torch.library.opcheck(ops.slot_replace_.default, (slots, count, None, frame, None, "flat"))
    torch.library.opcheck(ops.slot_replace_.default, (slots, count, torch.zeros(2, 3, 5), frame, streams, "mean"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()

    def step(ring, count, slots, written, means, x):
        ring_push_(ring, count, x[:, None])
        return slot_replace_(slots, written, x, level="mean", means=means), ring_read(ring, count)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    state = [torch.zeros(2, 3, 4, 20), torch.zeros(2, dtype=torch.int64)] * 2 + [torch.zeros(2, 3, 20)]
    state, expected = copies(*state), copies(*state)
    for i in range(3 * 3 + 1):
        x = random_tensor(2, 4, 20, seed=i)
        actual, wanted = compiled(*state, x), step(*expected, x)
        assert torch.equal(actual[0], wanted[0])
        for a, b in zip((*actual[1], *state), (*wanted[1], *expected), strict=True):
            assert_same(a, b)


SLOTS, COUNT, FRAMES = torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, 4, 5)
FRAME, MEANS = FRAMES[:, 0], torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ring_push_(0, COUNT, FRAMES), TypeError, "slots: expected a tensor"),
        (lambda: ring_push_(SLOTS[0], COUNT, FRAMES), ValueError, r"slots: expected a tensor \[S, M, N, D\]"),
        (lambda: ring_push_(SLOTS.int(), COUNT, FRAMES), ValueError, "slots: .*int32"),
        (lambda: ring_push_(SLOTS.mT.contiguous().mT, COUNT, FRAMES), ValueError, "slots: expected a contiguous"),
        (lambda: ring_push_(SLOTS.clone().requires_grad_(), COUNT, FRAMES), ValueError, "slots: .*without a gradient"),
        (lambda: ring_push_(SLOTS, COUNT[:1], FRAMES), ValueError, r"count: expected int64 \[2\]"),
        (lambda: ring_push_(SLOTS, COUNT.int(), FRAMES), ValueError, "count: expected int64.*int32"),
        (lambda: ring_push_(SLOTS, torch.zeros(4, dtype=torch.int64)[::2], FRAMES), ValueError, "count: .*contiguous"),
        (lambda: ring_push_(SLOTS, COUNT, FRAME), ValueError, r"frames: expected a tensor \[S, T, N, D\]"),
        (lambda: ring_push_(SLOTS, COUNT, FRAMES.double()), ValueError, "frames: expected slots's dtype"),
        (lambda: ring_push_(SLOTS, COUNT, FRAMES[..., 1:]), ValueError, "frames: .*with N = 4 and D = 5"),
        (lambda: ring_push_(SLOTS, COUNT, FRAMES[:1]), ValueError, "frames: expected 2 streams"),
        (lambda: ring_push_(SLOTS, COUNT, FRAMES, COUNT[:1]), ValueError, "frames: expected 1 streams"),
        (lambda: ring_push_(SLOTS, COUNT, FRAMES, [0, 1]), TypeError, "streams: expected a tensor"),
        (lambda: ring_push_(SLOTS, COUNT, FRAMES, COUNT.int()), ValueError, "streams: expected int64"),
        (lambda: ring_read(SLOTS, COUNT.int()), ValueError, "count: expected int64"),
        (lambda: slot_replace_(SLOTS, COUNT, FRAMES), ValueError, r"frames: expected a tensor \[S, N, D\]"),
        (lambda: slot_replace_(SLOTS, COUNT, FRAME, level="max"), ValueError, "level: expected one of"),
        (lambda: slot_replace_(SLOTS, COUNT, FRAME, means=MEANS), ValueError, "means: expected with level='mean' only"),
        (
            lambda: slot_replace_(SLOTS, COUNT, FRAME, level="mean", means=MEANS.half()),
            ValueError, r"means: expected torch.float32 \[2, 3, 5\], got torch.float16",
        ),
        (
            lambda: slot_replace_(SLOTS[:, :, :0], COUNT, FRAME[:, :0], level="mean"),
            ValueError, "slots: expected a contiguous|at least 1 token",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert not COUNT.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "frames"), [shape for shape in SHAPES if shape[0][3] < 1000])
def test_triton_push_interpreted(interpreter, shape, frames, dtype):
    def push(slots, count, x, streams):
        # shared with the child process, which writes in place
        interpreter(MODULE, "ring_push_", slots, count, x, streams)

    push_both(push, 4, shape, frames, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (2, 0, 3, 4), (2, 3, 0, 4), (0, 3, 4, 5), (1, 2, 30, 300)])
def test_triton_read_interpreted(interpreter, shape, dtype):
    slots, count = empty(*shape, dtype=dtype)
    ring_push_(slots, count, random_tensor(shape[0], 4, *shape[2:], dtype=dtype))
    for a, b in zip(interpreter(MODULE, "ring_read", slots, count), reference.ring_read(slots, count), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 0, 3, 4), (1, 3, 25, 700), (1, 20, 3, 9)])
def test_triton_replace_interpreted(interpreter, shape, dtype, variant):
    def replace(slots, count, frames, streams, level, means):
        return interpreter(MODULE, "slot_replace_", slots, count, means, frames, streams, level)

    replace_both(replace, shape[1] + 3, shape, variant, dtype)


@pytest.mark.parametrize("level", ["flat", "mean"])
def test_triton_replaces_the_first_of_equals_and_nan_first(interpreter, level):
    frame = random_tensor(1, 3, 300)
    slots, count = frame.expand(70, -1, -1)[None].clone(), torch.tensor([70])
    slots[0, :66] *= -1
    assert interpreter(MODULE, "slot_replace_", slots, count, None, frame, None, level).item() == 66
    slots[0, 68, 2, 299] = NAN
    assert interpreter(MODULE, "slot_replace_", slots, count, None, frame, None, level).item() == 68


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
