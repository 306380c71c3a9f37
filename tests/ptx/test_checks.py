"""Every check of the executor, by a few lines of PTX that violate it and as few that do not."""

import pytest
import torch

from tests.ptx import compiled
from tests.ptx.launch import VIOLATIONS
from tests.ptx.snippets import kinds, run

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))

# addresses: %rd10 of the lane's element in tensor 0, %rd11 in tensor 1, %r20 in shared memory
PLACES = """
mad.wide.u32 %rd10, %r0, 4, %rd0;
mad.wide.u32 %rd11, %r0, 4, %rd1;
mov.b32 %r20, global_smem;
shl.b32 %r21, %r0, 2;
add.u32 %r20, %r20, %r21;
"""
STORE = "st.shared.b32 [%r20], %r0;"
FLIPPED = """
xor.b32 %r22, %r21, 128;
mov.b32 %r23, global_smem;
add.u32 %r22, %r22, %r23;
"""  # %r22: the place of the same lane in the other of two warps
# a copy of 16 bytes by each of 8 lanes, from tensor 0
COPY = """
shl.b32 %r24, %r0, 4;
mov.b32 %r25, global_smem;
add.u32 %r25, %r25, %r24;
mad.wide.u32 %rd12, %r0, 16, %rd0;
setp.lt.u32 %p1, %r0, 8;
@%p1 cp.async.cg.shared.global [%r25], [%rd12], 16;
cp.async.commit_group;
"""


def found(body: str, *, warps: int = 1, programs: int = 1, elements: int = 64) -> set[str]:
    """Violations of ``body`` with tensor 0 an input and tensor 1 an output of 4-byte elements."""
    source, out = (
        torch.arange(elements, dtype=torch.int32),
        torch.zeros(elements, dtype=torch.int32),
    )
    record = run(PLACES + body, [source], [out], warps=warps, programs=programs, shared=1024)
    return kinds(record)


def one(name: str) -> set[str]:
    """The violation with this in its name."""
    (match,) = [v for v in VIOLATIONS if name in v]
    return {match}


def test_copying_an_array_is_right() -> None:
    assert found("ld.global.b32 %r9, [%rd10];\nst.global.b32 [%rd11], %r9;", warps=2) == set()


# ---- global memory ----


@pytest.mark.parametrize("offset", [-4, 256, 2**30])
def test_global_access_out_of_bounds(offset: int) -> None:
    read = f"add.s64 %rd12, %rd0, {offset};\nld.global.b32 %r9, [%rd12];"
    assert found(read) == one("global access out of bounds")
    write = f"add.s64 %rd12, %rd1, {offset};\nst.global.b32 [%rd12], %r0;"
    assert found(write) == one("global access out of bounds")


def test_a_guard_keeps_an_access_in_bounds() -> None:
    body = "setp.lt.u32 %p1, %r0, 10;\n@%p1 ld.global.b32 %r9, [%rd10];"
    assert found(body, elements=10) == set()
    assert found(body.replace("@%p1 ", ""), elements=10) == one("global access out of bounds")


def test_misaligned_global_access() -> None:
    assert found("ld.global.b32 %r9, [%rd0 + 2];") == one("misaligned global access")
    assert found("ld.global.v4.b32 {%r9, %r8, %r7, %r6}, [%rd0 + 8];") == one("misaligned global")
    assert found("ld.global.v4.b32 {%r9, %r8, %r7, %r6}, [%rd0 + 16];") == set()


def test_write_to_an_input() -> None:
    assert found("st.global.b32 [%rd10], %r0;") == one("write to an input")


def test_read_of_global_memory_never_written() -> None:
    read = "ld.global.b32 %r9, [%rd11];"
    assert found(read) == one("read of global memory never written")
    assert found(f"st.global.b32 [%rd11], %r0;\n{read}") == set()


def test_element_written_twice() -> None:
    assert found("st.global.b32 [%rd11], %r0;\nst.global.b32 [%rd11], %r1;") == one("written twice")
    assert found("st.global.b32 [%rd11], %r0;", programs=2) == one("written twice")


@pytest.mark.parametrize("writer_first", [True, False])
def test_race_between_programs(writer_first: bool) -> None:
    body = f"""
    mov.u32 %r2, %ctaid.x;
    setp.eq.u32 %p2, %r2, {int(not writer_first)};
    @%p2 st.global.b32 [%rd11], %r0;
    @!%p2 ld.global.b32 %r9, [%rd11];
    """
    assert one("one program writes") <= found(body, programs=2)


# ---- shared memory ----


@pytest.mark.parametrize("offset", [-4, 1024])
def test_shared_access_out_of_bounds(offset: int) -> None:
    body = f"mov.b32 %r9, global_smem;\nadd.s32 %r9, %r9, {offset};\n"
    assert found(body + "ld.shared.b32 %r8, [%r9];") == one("shared access out of bounds")
    assert found(body + "st.shared.b32 [%r9], %r0;") == one("shared access out of bounds")


def test_misaligned_shared_access() -> None:
    assert found("st.shared.b32 [%r20 + 2], %r0;") == one("misaligned shared access")


def test_read_of_shared_memory_never_written() -> None:
    assert found("ld.shared.b32 %r9, [%r20];") == one("read of shared memory never written")


def test_read_after_write() -> None:
    read = f"{FLIPPED}{STORE}\nbar.sync 0;\nld.shared.b32 %r9, [%r22];"
    assert found(read, warps=2) == set()
    # the warp that comes first reads what is not written yet, and the other writes it then
    without = found(read.replace("bar.sync 0;", ""), warps=2)
    never, before = one("read of shared memory never written"), one("write after read")
    assert without == never | before | one("read after write")


def test_write_after_read() -> None:
    body = f"""
    {FLIPPED}{STORE}
    bar.sync 0;
    ld.shared.b32 %r9, [%r22];
    bar.sync 0;
    add.u32 %r9, %r0, 1000;
    st.shared.b32 [%r20], %r9;
    """
    assert found(body, warps=2) == set()
    without = body.replace("[%r22];\n    bar.sync 0;", "[%r22];")
    between_warps = found(without.replace("%r21, 128", "%r21, 132"), warps=2)  # and lanes
    assert one("write after read") <= between_warps
    assert not one("lanes of a warp exchange data") & between_warps


def test_write_after_write() -> None:
    body = """
    mov.b32 %r9, global_smem;
    shl.b32 %r8, %r1, 2;
    add.u32 %r9, %r9, %r8;
    st.shared.b32 [%r9], VALUE;
    bar.sync 0;
    ld.shared.b32 %r7, [%r9];
    """
    assert found(body.replace("VALUE", "%r0"), warps=2) == one("write after write")
    assert found(body.replace("VALUE", "%r1"), warps=2) == set()  # the same bytes by both


def test_exchange_between_lanes() -> None:
    body = f"xor.b32 %r22, %r20, 4;\n{STORE}\nbar.warp.sync -1;\nld.shared.b32 %r9, [%r22];"
    assert found(body) == set()
    assert found(body.replace("bar.warp.sync -1;", "")) == one("lanes of a warp exchange data")


LATER = """
bar.warp.sync -1;
ld.shared.b32 %r9, [%r22];
BARRIER
add.u32 %r9, %r0, 1000;
st.shared.b32 [%r20], %r9;
"""  # every lane reads what lies at %r22 and changes its own place


@pytest.mark.parametrize(
    ("other", "hazard"),
    [
        ("xor.b32 %r22, %r20, 4;", True),
        ("mov.b32 %r22, %r20;", False),
        ("and.b32 %r22, %r20, -128;", True),  # all lanes that of the first or the last
        ("or.b32 %r22, %r20, 124;", True),
    ],
)
def test_write_over_what_another_lane_reads(other: str, hazard: bool) -> None:
    body = f"{other}\n{STORE}{LATER}"
    assert found(body.replace("BARRIER", "bar.warp.sync -1;")) == set()
    assert found(body.replace("BARRIER", "bar.sync 0;")) == set()
    expected = one("lanes of a warp exchange data") if hazard else set()
    assert found(body.replace("BARRIER", "")) == expected
    same = body.replace("BARRIER", "").replace("%r0, 1000", "%r0, 0")  # the bytes that are there
    assert found(same) == set()


@pytest.mark.parametrize("is_matrix", ["load", "store"])
def test_write_over_what_lanes_read_with_matrices(is_matrix: str) -> None:
    load, store = "ld.shared.b32 %r9, [%r20];", "st.shared.b32 [%r20], %r8;"
    if is_matrix == "load":
        load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r27];"
    else:
        store = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r27], {%r8};"
    body = f"""
    and.b32 %r26, %r0, 7;
    shl.b32 %r26, %r26, 4;
    mov.b32 %r27, global_smem;
    add.u32 %r27, %r27, %r26;
    {STORE}
    bar.warp.sync -1;
    {load}
    BARRIER
    add.u32 %r8, %r0, 1000;
    {store}
    """
    assert found(body.replace("BARRIER", "bar.warp.sync -1;")) == set()
    assert found(body.replace("BARRIER", "")) == one("lanes of a warp exchange data")


# ---- asynchronous copies ----


def test_read_of_a_copy_before_its_wait() -> None:
    read = "cp.async.wait_group 0;\nbar.sync 0;\n@%p1 ld.shared.b32 %r9, [%r25];"
    assert found(COPY + read) == set()
    assert found(COPY + read.replace("wait_group 0", "wait_group 1")) == one("before its wait")
    assert found(COPY + read.replace("wait_group 0", "wait_all")) == set()


def test_write_over_a_copy() -> None:
    write = "cp.async.wait_group 0;\n@%p1 st.shared.b32 [%r25], %r0;"
    assert found(COPY + write) == set()
    assert found(COPY + write.replace("cp.async.wait_group 0;", "")) == one("over an asynchronous")


def test_a_copy_fills_up_with_zeros() -> None:
    body = (
        COPY.replace(", 16;\ncp", ", 16, 8;\ncp")
        + """
    cp.async.wait_all;
    bar.sync 0;
    @%p1 ld.shared.v4.b32 {%r9, %r8, %r7, %r6}, [%r25];
    mad.wide.u32 %rd12, %r0, 16, %rd1;
    @%p1 st.global.v4.b32 [%rd12], {%r9, %r8, %r7, %r6};
    """
    )
    source, out = torch.arange(1, 33, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    assert not run(PLACES + body, [source], [out], shared=1024).violations
    assert torch.equal(out.view(8, 4)[:, :2], source.view(8, 4)[:, :2])
    assert not out.view(8, 4)[:, 2:].any()
    assert found(body.replace("16, 8;", "16, 20;")) == one("global access out of bounds")


def test_copies_finish_as_late_as_allowed() -> None:
    """The second of two groups may be pending after wait_group 1, the first may not."""
    body = (
        COPY
        + """
    add.u32 %r26, %r25, 512;
    @%p1 cp.async.cg.shared.global [%r26], [%rd12 + 128], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    """
    )
    assert found(body + "@%p1 ld.shared.b32 %r9, [%r25];") == set()
    assert found(body + "@%p1 ld.shared.b32 %r9, [%r26];") == one("before its wait")


# ---- control flow ----


def test_barrier_not_reached_by_all_warps() -> None:
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:"
    assert found(body, warps=2) == one("barrier not reached")


def test_two_barriers_are_not_one() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $other;
    bar.sync 0;
    ret;
    $other:
    bar.sync 0;
    """
    assert found(body, warps=2) == one("barrier not reached")
