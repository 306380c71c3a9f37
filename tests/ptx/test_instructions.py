"""Every instruction, lane by lane, against its definition written in Python."""

import random
import re

import numpy as np
import pytest
import torch

from tests.ptx import compiled
from tests.ptx.builder import PtxError
from tests.ptx.decoder import decode
from tests.ptx.launch import launch
from tests.ptx.meaning import bits_of, encoded, meaning, signed
from tests.ptx.snippets import HEADER, Given, lanes, run

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))

# Instructions whose tests are below or in the other files: those that name no type or have effects.
ELSEWHERE = {
    "ld.param", "ctaid", "tid", "nctaid", "bra", "ret", "bar.sync", "bar.warp.sync", "ld.global",
    "st.global", "ld.shared", "st.shared", "ldmatrix", "stmatrix", "cp.async",
    "cp.async.commit_group", "cp.async.wait_group", "mma.bf16", "mma.f16", "mma.tf32",
    "mma.bf16.k8", "mma.f16.k8", "mma.f64.884", "mma.f64.16816", "wgmma", "wgmma.fence",
    "wgmma.commit_group", "wgmma.wait_group", "fence.proxy.async", "blend", "pack16", "unpack16",
    "pack32", "unpack32", "selp.b32", "selp.b64", "and.pred", "or.pred", "xor.pred", "not.pred",
    "mov.pred", "bfi.b32", "shfl.sync.idx.b32", "shfl.sync.bfly.b32",
}  # fmt: skip
NAMES = sorted(set(compiled.op_codes()) - ELSEWHERE) if compiled.missing() is None else []
EDGES = (0, 1, 2, 15, 16, 31, 32, 33, 63, 64, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)


def operands_of(name: str, seed: int) -> list[list[int]]:
    """Three operands for 32 lanes: corners first, then random bits that suit the type."""
    draw = random.Random(seed)
    type_ = name.rpartition(".")[2]

    def one(lane: int, operand: int) -> int:
        if type_[0] in "fb" and type_ not in ("b16", "b32", "b64"):
            values = [
                draw.choice((-1, 1)) * draw.randint(0, 4095) * 2.0 ** draw.randint(-8, 3)
                for _ in range(2)
            ]
            if type_ == "f32x2":
                return encoded(values[0], "f32") | encoded(values[1], "f32") << 32
            if type_ in ("bf16", "f16"):
                last = operand == (2 if name.startswith("fma") else 1)
                return encoded(values[0], "f32" if last and "cvt" not in name else type_)
            return encoded(values[0], type_)
        if name.startswith("bfe") and operand:
            return draw.choice((0, 1, 5, 16, 31, 32, 40, 63, 64))
        if name.startswith(("shl", "shr", "shf")) and operand == (2 if "shf" in name else 1):
            return draw.choice((0, 1, 7, 15, 16, 31, 32, 63, 64))
        bits = 16 if type_ in ("b16", "u16", "s16") else 8 if type_ in ("u8", "s8") else 64
        value = EDGES[(5 * lane + 3 * operand) % len(EDGES)] if lane < 16 else draw.getrandbits(64)
        value = -value if bits == 64 and lane % 3 == 2 else value
        if name.startswith(("div", "rem")) and operand == 1:
            value = value | 1 if signed(value, bits_of(type_)) != -1 else 3
        return value & (2**bits - 1)

    return [[one(lane, operand) for lane in range(32)] for operand in range(3)]


def width_of_result(name: str) -> int:
    head, *middle, type_ = name.split(".")
    if head == "setp":
        return 1
    if head == "cvt":
        to = middle[-1]
        return 32 if to == "tf32" or "x2" in to else bits_of(to)
    if type_ in ("bf16", "f16"):
        return 32
    return 64 if "x2" in type_ else bits_of(type_) * (2 if "wide" in middle else 1)


def operand_bits(name: str) -> list[int]:
    head, *middle, type_ = name.split(".")
    bits = 64 if "x2" in type_ else bits_of(type_)
    count = {
        "mov": 1,
        "neg": 1,
        "not": 1,
        "abs": 1,
        "cvt": 1,
        "fma": 3,
        "mad": 3,
        "bfe": 3,
        "prmt": 3,
        "shf": 3,
    }.get(head, 2)
    if head == "cvt":
        return [bits] * (2 if "x2" in middle[-1] else 1)
    if type_ in ("bf16", "f16"):
        return [16] * (count - 1) + [32]
    if head in ("shl", "shr"):
        return [bits, 32]
    if head == "bfe":
        return [bits, 32, 32]
    if head == "mad" and "wide" in middle:
        return [bits, bits, 2 * bits]
    return [bits] * count


@pytest.mark.parametrize("name", NAMES)
def test_meaning(name: str) -> None:
    operands = operands_of(name, seed=len(name))
    registers = []
    prepare = ""
    for index, bits in enumerate(operand_bits(name)):
        registers.append(f"%rd1{index}" if bits == 64 else f"%r1{index}")
        if bits <= 16:
            prepare += f"cvt.u16.u32 %rs1{index}, %r1{index};\n"
            registers[-1] = f"%rs1{index}"
    width = width_of_result(name)
    target = {1: "%p1", 64: "%rd9", 32: "%r9"}.get(width, "%rs9")
    finish = {1: "selp.b32 %r9, 1, 0, %p1;"}.get(width, "")
    if width in (8, 16):
        finish = "cvt.u32.u16 %r9, %rs9;"
    tensors = [torch.from_numpy(np.array(o, np.uint64).view(np.int64)) for o in operands]
    body = f"{prepare}{name} {', '.join([target, *registers])};\n{finish}"
    got = lanes(body, *tensors, bits=64 if width == 64 else 32)
    mask = 2 ** max(width, 32) - 1
    for lane, (a, b, c) in enumerate(zip(*operands, strict=True)):
        want = meaning(name, a, b, c) & mask
        found = got[lane].item() & mask
        assert found == want, (
            f"lane {lane}: {name} of {a:#x}, {b:#x}, {c:#x}: {found:#x}, not {want:#x}"
        )


ARANGE = torch.arange(32)


def test_predicates() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 20;
    setp.gt.u32 %p2, %r1, 9;
    and.pred %p3, %p1, %p2;
    or.pred %p4, %p1, %p2;
    xor.pred %p5, %p1, %p2;
    not.pred %p6, %p1;
    mov.pred %p7, %p3;
    selp.b32 %r9, 1, 0, %p3;
    selp.b32 %r8, 2, 0, %p4;
    or.b32 %r9, %r9, %r8;
    selp.b32 %r8, 4, 0, %p5;
    or.b32 %r9, %r9, %r8;
    selp.b32 %r8, 8, 0, %p6;
    or.b32 %r9, %r9, %r8;
    selp.b64 %rd5, 16, 0, %p7;
    cvt.u32.u64 %r8, %rd5;
    or.b32 %r9, %r9, %r8;
    """
    a, b = ARANGE < 20, ARANGE > 9
    want = (a & b) + 2 * (a | b) + 4 * (a ^ b) + 8 * ~a + 16 * (a & b)
    assert torch.equal(lanes(body), want)


def test_guards() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 20;
    mov.b32 %r9, 7;
    @%p1 add.u32 %r9, %r1, 100;
    @!%p1 add.u32 %r9, %r9, 1000;
    """
    assert torch.equal(lanes(body), torch.where(ARANGE < 20, ARANGE + 100, 1007))


def test_guarded_predicate_and_64_bits() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 20;
    setp.lt.u32 %p2, %r1, 40;
    @%p1 setp.lt.u32 %p2, %r1, 0;
    mov.b64 %rd9, 5;
    @%p2 add.u64 %rd9, %rd9, 4294967296;
    """
    assert torch.equal(lanes(body, bits=64), torch.where(ARANGE < 20, 5, 2**32 + 5))


def test_packing() -> None:
    body = """
    mov.b32 {%rs1, %rs2}, %r10;
    mov.b32 %r9, {%rs2, %rs1};
    mov.b64 {%r8, %r7}, %rd10;
    mov.b64 %rd5, {%r9, %r8};
    mov.b64 %rd9, %rd5;
    """
    values = torch.tensor([random.Random(1).getrandbits(62) + i for i in range(32)])
    low = values & 0xFFFFFFFF
    swapped = (low >> 16) | (low & 0xFFFF) << 16
    assert torch.equal(lanes(body, values, bits=64), swapped | low << 32)


@pytest.mark.parametrize(
    ("position", "length"), [(0, 8), (5, 7), (28, 16), (32, 4), (0, 32), (3, 0)]
)
def test_bit_field_insert(position: int, length: int) -> None:
    a, b = torch.tensor([0x5A5A5A5A + i for i in range(32)]), torch.arange(32) * 0x01010101
    field = (2**length - 1 << position) & 0xFFFFFFFF
    want = (b & ~field) | ((a << position) & field)
    got = lanes(f"bfi.b32 %r9, %r10, %r11, {position}, {length};", a, b)
    assert torch.equal(got & 0xFFFFFFFF, want & 0xFFFFFFFF)


def test_shuffles() -> None:
    assert torch.equal(lanes("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;"), ARANGE ^ 5)
    assert torch.equal(lanes("shfl.sync.idx.b32 %r9, %r1, 3, 31, -1;"), torch.full((32,), 3))
    # in segments of 8 lanes, and the predicate of a lane that is there
    in_segments = "shfl.sync.idx.b32 %r9|%p1, %r1, 3, 6175, -1;\n@!%p1 mov.b32 %r9, 99;"
    assert torch.equal(lanes(in_segments), ARANGE // 8 * 8 + 3)


def test_programs_threads_and_parameters() -> None:
    out = torch.full((4, 64), -1, dtype=torch.int32)
    body = """
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %nctaid.x;
    mov.u32 %r4, %ctaid.y;
    mad.lo.u32 %r5, %r2, 64, %r0;
    mad.lo.u32 %r6, %r2, 1000, %r0;
    mad.lo.u32 %r6, %r3, 100000, %r6;
    add.u32 %r6, %r6, %r4;
    mov.b64 %rd20, snippet_0;
    ld.param.b64 %rd21, [%rd20];
    mad.wide.u32 %rd1, %r5, 4, %rd21;
    st.global.b32 [%rd1], %r6;
    """
    assert not run(body, [], [out], warps=2, programs=4).violations
    want = 400000 + 1000 * torch.arange(4)[:, None] + torch.arange(64)
    assert torch.equal(out.long(), want)


def test_parameters() -> None:
    """Each is aligned to its size; one may be read through its address."""
    source, out = torch.arange(32), torch.full((32,), -1)
    params = ", ".join(
        f"\n.param .{kind} snippet_{i}"
        for i, kind in enumerate(("u16", "u64", "u64", "s32", "u32"))
    )
    body = """
    ld.param.u64 %rd1, [snippet_1];
    mov.b64 %rd5, snippet_1;
    ld.param.u64 %rd2, [%rd5 + 8];
    ld.param.v2.u32 {%r2, %r3}, [snippet_3];
    ld.param.s32 %rd6, [snippet_3];
    ld.param.u32 %r4, [snippet_4];
    ld.param.u16 %rs1, [snippet_0];
    mad.wide.u32 %rd3, %r0, 8, %rd1;
    mad.wide.u32 %rd4, %r0, 8, %rd2;
    ld.global.b64 %rd7, [%rd3];
    add.u64 %rd7, %rd7, %rd6;
    cvt.u64.u16 %rd8, %rs1;
    add.u64 %rd7, %rd7, %rd8;
    cvt.u64.u32 %rd8, %r3;
    add.u64 %rd7, %rd7, %rd8;
    cvt.u64.u32 %rd8, %r4;
    add.u64 %rd7, %rd7, %rd8;
    st.global.b64 [%rd4], %rd7;
    """
    text = f"{HEADER.format(params=params, threads=32)}mov.u32 %r0, %tid.x;\n{body}ret;\n}}\n"
    assert decode(text).params == [(0, 2), (8, 8), (16, 8), (24, 4), (28, 4)]
    arguments = [("i16", 100), ("*i64", source), ("*i64", out), ("i32", -1000000), ("u32", 7000)]
    record = launch(text, (1, 1, 1), arguments, warps=1, shared=0, memory=Given(out))
    assert record.violations == []
    assert torch.equal(out, source - 1000000 + 100 + 2 * 7000)
    with pytest.raises(ValueError, match="2 bytes, got 8"):
        wrong = [("i64", 100), *arguments[1:]]
        launch(text, (1, 1, 1), wrong, warps=1, shared=0, memory=Given(out))


def test_loads_and_stores_of_another_width_than_the_register() -> None:
    values = torch.tensor([-7, 2**31 - 1, -(2**31), 300] * 8, dtype=torch.int32)
    body = """
    mad.wide.u32 %rd10, %r0, 4, %rd0;
    mad.wide.u32 %rd11, %r0, 16, %rd1;
    ld.global.b32 %rd20, [%rd10];
    ld.global.s32 %rd21, [%rd10];
    st.global.b64 [%rd11], %rd20;
    st.global.b64 [%rd11 + 8], %rd21;
    mad.wide.u32 %rd12, %r0, 8, %rd2;
    ld.global.u8 %r20, [%rd10];
    ld.global.s8 %r21, [%rd10];
    st.global.b32 [%rd12], %rd21;
    cvt.u16.u32 %rs1, %r20;
    cvt.u16.u32 %rs2, %r21;
    st.global.v2.b16 [%rd12 + 4], {%rs1, %rs2};
    """
    wide, narrow = torch.zeros(32, 2, dtype=torch.int64), torch.zeros(32, 2, dtype=torch.int32)
    assert not run(body, [values], [wide, narrow]).violations
    assert torch.equal(wide[:, 0], values.long() & 0xFFFFFFFF)
    assert torch.equal(wide[:, 1], values.long())
    assert torch.equal(narrow[:, 0], values)
    halves = narrow[:, 1].contiguous().view(torch.int16).view(32, 2)
    assert torch.equal(halves[:, 0], values.to(torch.uint8).to(torch.int16))
    assert torch.equal(halves[:, 1], values.to(torch.int8).to(torch.int16))


def test_loops_scopes_and_constants() -> None:
    body = """
    mov.b32 %r9, 0;
    mov.b32 %r2, 0;
    $loop:
    { .reg .pred p;
    .reg .b32 t;
    add.u32 t, %r2, 2;
    add.u32 %r9, %r9, t;
    }
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, 10;
    @%p1 bra $loop;
    """
    body = body.replace("{ .reg .pred p;\n", "{\n.reg .pred p;\n")
    assert torch.equal(lanes(body), torch.full((32,), 65))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("atom.global.add.u32 %r9, [%rd0], 1;", "no atom.global.add.u32"),
        ("add.u32 %r9, %r999, 1;", "unknown register %r999"),
        ("add.u32 %r9, %r1, nothing;", "unknown operand nothing"),
        ("bar.sync 1;", "only barrier 0"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1};", "no mma"),
        ("ld.local.b32 %r9, [%rd0];", "ld.local"),
        ("ld.param.b32 %r9, [other];", "unknown parameter other"),
        ("add.u32 %r9, %rd0, 1;", "%rd0 of 8 bytes, expected 4"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_an_error(line: str, message: str) -> None:
    with pytest.raises(PtxError, match=re.escape(message)):
        run(line, [], [torch.zeros(1)])


def test_arguments_are_those_of_the_kernel() -> None:
    text = HEADER.format(params="\n.param .u32 snippet_0", threads=32) + "ret;\n}\n"
    with pytest.raises(ValueError, match="1 parameters, got 0"):
        launch(text, (1, 1, 1), [], warps=1, shared=0, memory=Given())
    with pytest.raises(ValueError, match="4 bytes, got 8 of i64"):
        launch(text, (1, 1, 1), [("i64", 1)], warps=1, shared=0, memory=Given())
    with pytest.raises(ValueError, match="32 threads compiled, 4 warps launched"):
        launch(text, (1, 1, 1), [("i32", 1)], warps=4, shared=0, memory=Given())
