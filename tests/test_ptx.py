"""The runner of compiled GPU code, on kernels written by hand: against NumPy, torch, the tables of the PTX manual."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vmemory._ptx.machine import Kernel
from vmemory._ptx.program import PtxError
from vmemory.testing import random_tensor

REGISTERS = ".reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<64>, %f<16>; .reg .b64 %d<32>;"
# %r0 is the lane's number, %d20 its place of 4 bytes; %d0, %d1, ... are the tensors, %d10, %d11, ... this lane's places
BEGIN = "mov.u32 %r0, %tid.x; mul.wide.u32 %d20, %r0, 4;"


def run(body: str, *tensors: Tensor, grid: int = 1, threads: int = 32, shared: int = 0) -> None:
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 t{i}" for i in range(len(tensors)))
    begin = BEGIN + "".join(
        f"ld.param.b64 %d{i}, [t{i}]; add.s64 %d{10 + i}, %d{i}, %d20;" for i in range(len(tensors))
    )
    text = f".visible .entry kernel({parameters}) .reqntid {threads} {{ {REGISTERS} {begin} {body} ret; }}"
    Kernel(text).launch((grid, 1, 1), threads, shared, [x.data_ptr() for x in tensors], tensors)


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lanes(threads: int = 32) -> Tensor:
    return torch.zeros(threads, dtype=torch.int32)


def computed(instruction: str, *values: Tensor, kind: str = "b32") -> Tensor:
    """`{d}` and `{0}`, `{1}` of an instruction of 4-byte registers, a lane for each value."""
    count = len(values[0])
    padded = [torch.cat([x, x.new_ones(-count % 32)]) for x in values]
    out = torch.zeros_like(padded[0])
    loads = "".join(f"ld.global.b32 %r{1 + i}, [%d{11 + i}];" for i in range(len(values)))
    text = instruction.format(*(f"%r{1 + i}" for i in range(len(values))), d="%r9")
    run(f"{loads} {text}; st.global.b32 [%d10], %r9;", out, *padded, threads=len(out))
    return out[:count]


@pytest.mark.parametrize("signed", [True, False])
def test_a_field_of_bits_takes_its_highest_bit_as_sign(signed):
    def expected(a: int, place: int, length: int) -> int:
        # the manual's own words
        top = a >> min(place + length - 1, 31) & 1 if signed and length else 0
        bits = [(a >> place + k & 1) if k < length and place + k <= 31 else top for k in range(32)]
        return sum(bit << k for k, bit in enumerate(bits))

    cases = [
        (a, place, length) for a in (0x12345678, 0xFEDCBA98) for place in (0, 3, 31, 40) for length in (0, 1, 7, 32)
    ]
    values = torch.tensor(cases).T.to(torch.int64).to(torch.int32).contiguous()
    found = computed(f"bfe.{'s' if signed else 'u'}32 {{d}}, {{0}}, {{1}}, {{2}}", *values)
    assert [x & 0xFFFFFFFF for x in found.tolist()] == [expected(*case) for case in cases]


@pytest.mark.parametrize(("text", "value"), [("0x7fU", 127), ("5U", 5), ("-1", -1), ("0f3F800000", 0x3F800000)])
def test_immediates(text, value):
    assert computed(f"mov.b32 {{d}}, {text}", whole(0)).item() == value


# by hand; a division by zero has no defined result
@pytest.mark.parametrize(
    ("instruction", "a", "b", "expected"),
    [
        ("div.s32 {d}, {0}, {1}", [7, -7, 7, -7, -2147483648], [2, 2, -2, -2, 3], [3, -3, -3, 3, -715827882]),
        ("rem.s32 {d}, {0}, {1}", [7, -7, 7, -7], [2, 2, -2, -2], [1, -1, 1, -1]),
        ("div.u32 {d}, {0}, {1}", [-1], [2], [2147483647]),
        ("mul.hi.u32 {d}, {0}, {1}", [-1, 5], [-1, 5], [-2, 0]),
        ("mul.hi.s32 {d}, {0}, {1}", [-2147483648, -1], [2, 5], [-1, -1]),
        ("shl.b32 {d}, {0}, {1}", [1, 1, 1], [31, 32, -1], [-2147483648, 0, 0]),
        ("shr.u32 {d}, {0}, {1}", [-1, -1], [31, 32], [1, 0]),
        ("shr.s32 {d}, {0}, {1}", [-8, -8], [2, 40], [-2, -1]),
        ("max.u32 {d}, {0}, {1}", [-1], [1], [-1]),
        ("max.s32 {d}, {0}, {1}", [-1], [1], [1]),
        ("prmt.b32 {d}, {0}, {1}, 0x7632", [0x33221100], [0x77665544], [0x77663322]),
        ("prmt.b32 {d}, {0}, {1}, 0xF808", [0x33221180], [0x77665544], [0x00FF80FF]),
        ("cvt.s32.s8 {d}, {0}", [0x180], [0], [-128]),
        ("setp.lt.u32 %p1, {0}, {1}; selp.b32 {d}, 10, 20, %p1", [-1, 1], [1, 2], [20, 10]),
    ],
)
def test_integers(instruction, a, b, expected):
    assert computed(instruction, whole(*a), whole(*b)).tolist() == expected


def bits(*values: float) -> Tensor:
    return torch.tensor(values).view(torch.int32)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("instruction", "a", "b", "expected"),
    [
        ("max.f32 {d}, {0}, {1}", [NAN, 1.0], [2.0, NAN], [2.0, 1.0]),
        ("max.NaN.f32 {d}, {0}, {1}", [NAN, 1.0], [2.0, 3.0], [NAN, 3.0]),
        ("copysign.f32 {d}, {0}, {1}", [-1.0], [3.0], [-3.0]),
        ("mul.ftz.f32 {d}, {0}, {1}", [1e-20, 1e-39], [-1e-20, 1e10], [-0.0, 0.0]),
        ("mul.f32 {d}, {0}, {1}", [1e-20], [1e-20], [1e-40]),
        # one rounding: (1 + e)^2 - 1 - 2 e is e^2
        ("fma.rn.f32 {d}, {0}, {0}, {1}", [1 + 2**-23], [-1 - 2**-22], [2**-46]),
        ("setp.neu.f32 %p1, {0}, {1}; selp.f32 {d}, {0}, 0f00000000, %p1", [NAN, 1.0], [1.0, 1.0], [NAN, 0.0]),
        ("setp.ne.f32 %p1, {0}, {1}; selp.f32 {d}, {0}, 0f00000000, %p1", [NAN, 2.0], [1.0, 1.0], [0.0, 2.0]),
    ],
)
def test_floats(instruction, a, b, expected):
    found = computed(instruction, bits(*a), bits(*b)).view(torch.float32)
    assert torch.equal(found.nan_to_num(nan=7.5), torch.tensor(expected).nan_to_num(nan=7.5))
    assert torch.equal(found.signbit() & ~found.isnan(), torch.tensor(expected).signbit())


def test_a_float_becomes_the_nearest_integer_there_is():
    values = bits(2.5, -2.5, 3e9, -3e9, NAN, INF)
    assert computed("cvt.rzi.s32.f32 {d}, {0}", values).tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 2**31 - 1]
    assert computed("cvt.rni.s32.f32 {d}, {0}", bits(2.5, 3.5)).tolist() == [2, 4]
    assert computed("cvt.rmi.f32.f32 {d}, {0}", bits(-2.5)).view(torch.float32).tolist() == [-3.0]


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_rounds_as_torch_does(kind, dtype):
    x = torch.cat([random_tensor(59), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, INF, -INF, NAN])])
    packed = torch.empty(64, dtype=torch.int32)
    load = "ld.global.b32 %r1, [%d11];"
    run(f"{load} cvt.rn.{kind}x2.f32 %r2, %r1, %r1; st.global.b32 [%d10], %r2;", packed, x, threads=64)
    expected = x.to(dtype)
    for half in packed.view(dtype).reshape(64, 2).T:
        assert torch.equal(half.nan_to_num(), expected.nan_to_num())
        assert torch.equal(half.isnan(), expected.isnan())
    back = torch.empty(64)
    again = f"mov.b32 {{%h1, %h2}}, %r1; cvt.f32.{kind} %r2, %h2; st.global.b32 [%d10], %r2;"
    run(load + again, back, packed, threads=64)
    assert torch.equal(back.nan_to_num(), expected.float().nan_to_num())


@pytest.mark.parametrize(
    ("mode", "operands", "source"),
    [
        ("bfly", "5, 31", lambda lane: lane ^ 5),
        ("up", "3, 0", lambda lane: np.where(lane >= 3, lane - 3, lane)),
        ("down", "3, 31", lambda lane: np.where(lane + 3 < 32, lane + 3, lane)),
        ("idx", "7, 31", lambda lane: 0 * lane + 7),
        # segments of 8 lanes: 31 - 8 = 24 in bits 8 to 12
        ("down", "3, 0x1807", lambda lane: np.where(lane % 8 + 3 < 8, lane + 3, lane)),
    ],
)
def test_shuffles(mode, operands, source):
    out = lanes(64)
    run(
        f"add.s32 %r1, %r0, 100; shfl.sync.{mode}.b32 %r2, %r1, {operands}, -1; st.global.b32 [%d10], %r2;",
        out,
        threads=64,
    )
    lane = np.arange(64) % 32
    assert out.tolist() == (100 + np.arange(64) - lane + source(lane)).tolist()


def test_a_warp_is_reduced():
    x, out = whole(*range(-32, 32)), lanes(64)
    body = "ld.global.b32 %r1, [%d11]; mov.b32 %r3, -1; redux.sync.{}.{} %r2, %r1, %r3; st.global.b32 [%d10], %r2;"
    for name, kind, expected in (("add", "s32", [-528, 496]), ("max", "s32", [-1, 31]), ("min", "u32", [-32, 0])):
        run(body.format(name, kind), out, x, threads=64)
        assert out.reshape(2, 32).tolist() == [[value] * 32 for value in expected]


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_matrices_lie_in_lanes_as_the_manual_says(kind, dtype):
    a, b, c = (random_tensor(*shape, seed=i) for i, shape in enumerate([(16, 16), (16, 8), (16, 8)]))
    a, b = a.to(dtype), b.to(dtype)
    held_a, held_b = torch.empty(32, 8, dtype=dtype), torch.empty(32, 4, dtype=dtype)
    held_c, out = torch.empty(32, 4), torch.empty(32, 4)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            held_a[lane, i] = a[row, 2 * member + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            held_b[lane, i] = b[2 * member + (i & 1) + (8 if i >= 2 else 0), group]
            held_c[lane, i] = c[group + (0 if i < 2 else 8), 2 * member + (i & 1)]
    run(
        """
        shl.b64 %d5, %d20, 1; shl.b64 %d6, %d20, 2;
        add.s64 %d7, %d0, %d6; add.s64 %d8, %d1, %d6; add.s64 %d9, %d2, %d5; add.s64 %d4, %d3, %d6;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d8]; ld.global.v2.b32 {%r5, %r6}, [%d9];
        ld.global.v4.b32 {%f1, %f2, %f3, %f4}, [%d4];
        mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32
            {%f5, %f6, %f7, %f8}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
        st.global.v4.b32 [%d7], {%f5, %f6, %f7, %f8};
        """.replace("KIND", kind),
        out, held_a, held_b, held_c,
    )  # fmt: skip
    expected = (a.double() @ b.double() + c.double()).float()
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == expected[lane // 4 + (0 if i < 2 else 8), 2 * (lane % 4) + (i & 1)]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_lane_two_numbers_of_a_row(trans):
    x, out = torch.arange(4 * 8 * 8, dtype=torch.int16).reshape(4, 8, 8), torch.zeros(32, 8, dtype=torch.int16)
    run(
        f"""
        shl.b64 %d5, %d20, 2; add.s64 %d6, %d1, %d5; add.s64 %d7, %d0, %d5; shl.b32 %r9, %r0, 4;
        cp.async.cg.shared.global [ %r9 + 0 ], [ %d6 + 0 ], 0x10; cp.async.commit_group;
        cp.async.wait_group 0; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r9];
        st.global.v4.b32 [%d7], {{%r1, %r2, %r3, %r4}};
        """,
        out, x, shared=512,
    )  # fmt: skip
    for lane in range(32):
        for m in range(4):
            row = x[m].T[lane // 4] if trans else x[m][lane // 4]
            assert out[lane, 2 * m : 2 * m + 2].tolist() == row[2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


def test_copies_to_shared_memory_end_with_zeros():
    x, out = whole(*range(1, 33)), lanes()
    run(
        """
        shl.b32 %r1, %r0, 2; setp.lt.s32 %p1, %r0, 20; selp.b32 %r2, 4, 0, %p1;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %d11 + 0 ], 0x4, %r2;
        ld.shared.b32 %r3, [%r1]; st.global.b32 [%d10], %r3;
        """,
        out, x, shared=128,
    )  # fmt: skip
    assert out.tolist() == [*range(1, 21), *[0] * 12]


def test_parted_lanes_loop_as_often_as_each_wants_and_meet_again():
    out = lanes(64)
    run(
        """
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        $again: setp.ge.s32 %p1, %r1, %r0; @%p1 bra $done; add.s32 %r1, %r1, 1; add.s32 %r2, %r2, %r1; bra.uni $again;
        $done: shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; st.global.b32 [%d10], %r3;
        """,
        out, threads=64,
    )  # fmt: skip
    assert out.tolist() == [(n ^ 1) * ((n ^ 1) + 1) // 2 for n in range(64)]


def test_a_shuffle_waits_for_its_warp():
    """The upper half of the warp goes another way first, to instructions that come later in the text."""
    out = lanes()
    run(
        """
        mov.b32 %r1, %r0; setp.ge.s32 %p1, %r0, 16; @%p1 bra $far;
        $near: bar.warp.sync -1; shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1; st.global.b32 [%d10], %r2; ret;
        $far: add.s32 %r1, %r0, 100; bra $near;
        """,
        out,
    )  # fmt: skip
    assert out.tolist() == [*range(116, 132), *range(16)]


def test_a_barrier_lets_all_lanes_go_on_together():
    """Two ways lead to two barriers; each side reads what the other wrote before its own."""
    out = lanes(128)
    run(
        """
        shl.b32 %r1, %r0, 2; xor.b32 %r2, %r1, 256; setp.ge.s32 %p1, %r0, 64; @%p1 bra $second;
        st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r3, [%r2]; bra $end;
        $second: st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r3, [%r2];
        $end: st.global.b32 [%d10], %r3;
        """,
        out, threads=128, shared=512,
    )  # fmt: skip
    assert out.tolist() == [n ^ 64 for n in range(128)]


def test_programs_have_shared_memory_of_their_own():
    out = lanes(64)
    run(
        """
        mov.u32 %r4, %ctaid.x; shl.b32 %r1, %r0, 2; add.s32 %r2, %r0, %r4; st.shared.b32 [%r1], %r2; bar.sync 0;
        xor.b32 %r3, %r1, 4; ld.shared.b32 %r5, [%r3]; mul.wide.u32 %d5, %r4, 128; add.s64 %d6, %d10, %d5;
        st.global.b32 [%d6], %r5;
        """,
        out, grid=2, shared=128,
    )  # fmt: skip
    assert out.tolist() == [(n % 32 ^ 1) + n // 32 for n in range(64)]


def test_unwritten_shared_memory_and_registers_are_nan():
    out = torch.zeros(64)
    run(
        """
        shl.b32 %r1, %r0, 2; ld.shared.b32 %r2, [%r1]; st.global.b32 [%d10], %r2;
        st.global.b32 [%d10 + 128], %r3; ret;
        """,
        out, shared=128,
    )  # fmt: skip
    assert out.isnan().all()
    run("setp.lt.s32 %p1, %r0, 5; @%p1 mov.b32 %r2, 0; st.global.b32 [%d10], %r2;", out)
    assert out[:32].isnan().tolist() == [False] * 5 + [True] * 27


def test_atomic_operations_count_every_lane():
    out = torch.tensor([5, -7])
    run("mov.b64 %d5, 3; atom.global.gpu.relaxed.add.u64 %d6, [%d0], %d5; cvt.s64.s32 %d7, %r0;"
        "red.global.gpu.relaxed.max.s64 [%d0 + 8], %d7;", out, grid=2)  # fmt: skip
    assert out.tolist() == [5 + 3 * 64, 31]


STORE = "st.global.b32 [%d10], %r0;"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("st.global.b32 [%d10 + 4], %r0;", "1 lanes are outside of every tensor"),
        ("ld.global.b32 %r1, [%d10 + -4];", "1 lanes are outside of every tensor"),
        ("ld.global.b64 %d5, [%d10];", "not a multiple of 8 bytes"),
        ("ld.global.b32 %r1, [%d10 + 2];", "not a multiple of 4 bytes"),
        ("mov.b32 %r1, 64; ld.shared.b32 %r2, [%r1];", "outside of the 64 bytes of shared memory"),
        ("mov.b32 %r1, 2; ld.shared.b32 %r2, [%r1];", "not a multiple of 4 bytes"),
        ("ld.global.b32 %r1, [%d5];", "expected a register that was written"),
        ("mov.b32 %r1, 0; st.shared.b32 [%r1], %r0;", "lanes write different values to one place"),
        ("atom.global.gpu.relaxed.add.u32 %r1, [%d10], 1; add.s32 %r2, %r1, 1;", "the old value is not known here"),
        (
            "setp.lt.s32 %p1, %r0, 3; @%p1 bra $out; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $out:",
            "never come, at shfl",
        ),
        ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xff;", "every lane of the warp"),
        ("add.sat.s32 %r1, %r0, 1;", "sat is not known here"),
        ("sin.approx.f32 %r1, %r0;", "not known here"),
        ("add.s32 %r1, %r0, nothing;", "expected a register or a number"),
    ],
)
def test_what_no_kernel_may_do_is_refused(body, words):
    with pytest.raises(PtxError, match=words):
        run(body, lanes(), shared=64)


def test_a_barrier_waits_for_all_lanes_that_have_not_ended():
    out = lanes(64)
    run("setp.lt.s32 %p1, %r0, 32; @%p1 ret; bar.sync 0; st.global.b32 [%d10], %r0;", out, threads=64)
    assert out.tolist() == [*[0] * 32, *range(32, 64)]
    with pytest.raises(PtxError, match=r"never come, at bar\.sync 0; shfl"):
        run("setp.lt.s32 %p1, %r0, 16; @%p1 bra $on; bar.sync 0; $on: shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", out)


def test_a_place_that_one_program_writes_is_no_other_programs():
    for body in (STORE, f"mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r1, 0; @%p1 {STORE} ld.global.b32 %r2, [%d10];"):
        with pytest.raises(PtxError, match=r"two programs write one place|reads what another wrote"):
            run(body, lanes(), grid=2)
        run(body, lanes(), grid=1)


def test_tensors_side_by_side_are_not_one():
    memory = torch.zeros(64, dtype=torch.int32)
    load = "ld.global.v2.b32 {%r1, %r2}, [%d0 + 120];"
    run(load, memory)
    with pytest.raises(PtxError, match="outside of every tensor"):
        run(load, memory[:31], memory[31:])
