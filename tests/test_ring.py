from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rings import DTYPES, NAN, SHAPES, VARIANTS, assert_same, copies, empty, means_for, push_both, replace_both
from vmemory.ops import ring_push_, ring_read, slot_replace_
from vmemory.reference import ring as reference
from vmemory.testing import layouts, poisoned, random_tensor


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
